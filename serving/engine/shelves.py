"""What was read beside KV blocks: one shelf for the directions of the start, one more for those of each reload.

What is filed belongs to a direction, never to a column: a column that is handed out again is another entry, on another
shelf, and nothing that was read for the old direction is ever taken for the new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.bank import Entry
from serving.engine.store import Index, ReadoutStore


@dataclass(frozen=True, slots=True)
class Part:
    """What a reading takes from one shelf.

    Attributes:
        store: the shelf.
        kept: (k,) places among the columns that it keeps.
        columns: (k,) of a row of readouts.
    """

    store: ReadoutStore
    kept: npt.NDArray[np.intp]
    columns: npt.NDArray[np.intp]


class Reading:
    """What one plan reads, wherever it is filed.

    Args:
        parts: from which shelves.
        width: of a row of readouts.
    """

    def __init__(self, parts: Sequence[Part], width: int) -> None:
        self._parts = tuple(parts)
        self._width = width

    def covered(self, blocks: Index, *, filed: bool = False) -> int:
        """As ``ReadoutStore.covered``: of everything that the plan reads."""
        return min(part.store.covered(blocks, filed=filed) for part in self._parts)

    def is_filed(self, blocks: Index) -> bool:
        """As ``ReadoutStore.is_filed``."""
        return all(part.store.is_filed(blocks) for part in self._parts)

    def read(self, blocks: Index) -> npt.NDArray[np.float32]:
        """As ``ReadoutStore.read``; columns that the plan does not read are zero."""
        rows = np.zeros((len(blocks) * self._parts[0].store.block_size, self._width), dtype=np.float32)
        missing = np.zeros(len(rows), dtype=bool)
        for part in self._parts:
            found, filed = part.store.kept(blocks, part.kept)
            rows[:, part.columns] = found
            missing |= ~filed
        rows[missing] = np.nan
        return rows


class Shelves:
    """All that is filed beside the KV blocks of one engine.

    Args:
        num_blocks: KV blocks of the engine.
        block_size: tokens in a block.
        width: of a row of readouts.
    """

    def __init__(self, *, num_blocks: int, block_size: int, width: int) -> None:
        self.block_size = block_size
        self._num_blocks = num_blocks
        self._width = width
        self._shelves: list[tuple[ReadoutStore, tuple[Entry, ...]]] = []
        self._wanted: frozenset[Entry] = frozenset()

    @property
    def stores(self) -> tuple[ReadoutStore, ...]:
        """The shelves as they are now: rows of a step that is scheduled now belong onto these, and onto no later."""
        return tuple(store for store, _ in self._shelves)

    def hold(self, wanted: Iterable[Entry]) -> None:
        """Keep these entries from now on, and no others: what was filed of an entry that goes is void for good.

        Args:
            wanted: what the plans read that requests run under or may begin with.
        """
        now = frozenset(wanted)
        gone = self._wanted - now
        self._shelves = [
            (store, kept)
            for store, entries in self._shelves
            if (kept := tuple(entry if entry not in gone else _VOID for entry in entries)).count(_VOID) < len(kept)
        ]
        fresh = tuple(sorted(now - self._wanted))
        if fresh:
            store = ReadoutStore(
                num_blocks=self._num_blocks,
                block_size=self.block_size,
                columns=np.array([column for column, _ in fresh], dtype=np.intp),
                width=self._width,
            )
            self._shelves.append((store, fresh))
        self._wanted = now

    def reading(self, entries: Iterable[Entry]) -> Reading:
        """Where these entries are filed.

        Args:
            entries: that are held, at least one.
        """
        missing, parts = set(entries), []
        for store, kept in self._shelves:
            places = [place for place, entry in enumerate(kept) if entry in missing]
            missing -= {kept[place] for place in places}
            if places:
                columns = np.array([kept[place][0] for place in places], dtype=np.intp)
                parts.append(Part(store, np.array(places, dtype=np.intp), columns))
        if missing:
            raise ValueError(f"{len(missing)} entries are read that are not held; call hold with them first")
        return Reading(parts, self._width)


_VOID: Entry = (-1, "")
"""In the place of an entry that has gone: no plan reads it."""
