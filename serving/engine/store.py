"""The readout store: what the taps read, kept beside vLLM's KV blocks, so that a cached prefix is not an unseen one.

Indexed by KV-block id: a block that vLLM's prefix cache hands out still holds the keys and values of the tokens that
were computed into it, and the store holds the readouts of exactly those tokens. It therefore needs no eviction of its
own and has room for every block there is. Knows no request and decides nothing.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]


class RowState(IntEnum):
    """What the store knows of one token's place in one block."""

    EMPTY = 0
    PENDING = 1
    """The block was handed out; readouts come with the result of the step that computes its tokens."""
    FILED = 2


class ReadoutStore:
    """Readouts of all cached tokens.

    Args:
        num_blocks: KV blocks of the engine.
        block_size: tokens in a block.
        columns: of a row of readouts, those that mean something; only they are kept.
        width: of a row of readouts.
    """

    def __init__(self, *, num_blocks: int, block_size: int, columns: npt.NDArray[np.intp], width: int) -> None:
        self.block_size = block_size
        self._width = width
        self._columns = columns
        self._rows = np.empty((num_blocks, block_size, len(columns)), dtype=np.float32)
        self._state = np.zeros((num_blocks, block_size), dtype=np.uint8)

    @property
    def nbytes(self) -> int:
        """Memory that is reserved; the system hands it out as blocks are first used."""
        return self._rows.nbytes + self._state.nbytes

    @property
    def block_nbytes(self) -> int:
        """Memory of one block: of the readouts and states of its tokens."""
        return self._rows[:1].nbytes + self._state[:1].nbytes

    def expect(self, blocks: Index) -> None:
        """These blocks have been handed out anew: what they held is void, what they will hold is on its way."""
        self._state[blocks] = RowState.PENDING

    def lose(self, blocks: Index) -> None:
        """A step that wrote to these blocks was lost: they are no longer whole, and no hit on them is allowed."""
        self._state[blocks] = RowState.EMPTY

    def lose_all(self) -> None:
        """What is filed cannot be relied on any more: no hit on any block is allowed until it is computed anew."""
        self._state[:] = RowState.EMPTY

    def file(self, blocks: Index, offsets: Index, readouts: npt.NDArray[np.float32]) -> None:
        """Keep the readouts of these places.

        Args:
            blocks: (n,) block ids.
            offsets: (n,) places inside the blocks.
            readouts: (n, width).
        """
        self._rows[blocks, offsets] = readouts[:, self._columns]
        self._state[blocks, offsets] = RowState.FILED

    def covered(self, blocks: Index, *, filed: bool = False) -> int:
        """How many of these blocks, from the first on, have readouts or will have them once their step is back.

        Args:
            blocks: in order.
            filed: whether those on their way do not count.
        """
        state = self._state[blocks]
        whole = (state == RowState.FILED if filed else state != RowState.EMPTY).all(axis=1)
        return len(blocks) if whole.all() else int(np.argmin(whole))

    def is_filed(self, blocks: Index) -> bool:
        """Whether nothing of these blocks is missing or still on its way."""
        return bool((self._state[blocks] == RowState.FILED).all())

    def read(self, blocks: Index) -> npt.NDArray[np.float32]:
        """The readouts of whole blocks, in order.

        Returns: (len(blocks) * block_size, width) float32; NaN where nothing was filed, which the monitor counts as a
            gap.
        """
        rows = np.zeros((len(blocks) * self.block_size, self._width), dtype=np.float32)
        rows[:, self._columns], filed = self.kept(blocks)
        rows[~filed] = np.nan
        return rows

    def kept(
        self, blocks: Index, places: npt.NDArray[np.intp] | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Some of what is kept of whole blocks, in order.

        Args:
            blocks: their ids.
            places: (k,) among the columns that are kept; None for all.
        Returns: (n, k) float32 and (n,) whether it was filed; where it was not, the numbers mean nothing.
        """
        count = len(blocks) * self.block_size
        rows = self._rows[blocks].reshape(count, -1)
        if places is not None and len(places) < rows.shape[1]:
            rows = rows[:, places]
        return rows, (self._state[blocks] == RowState.FILED).reshape(count)
