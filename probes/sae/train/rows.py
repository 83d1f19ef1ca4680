"""The rows that an autoencoder is trained on, in any number of files, mapped and not loaded; knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from probes.errors import TelltaleError

__all__ = ["Float32", "RowPool", "RowsError"]

Float32 = npt.NDArray[np.float32]
_BATCH = 8192


class RowsError(TelltaleError, ValueError):
    """There are no rows, or they do not fit each other."""


class RowPool:
    """Rows of several arrays as if they were one.

    In memory are 8 bytes a row where some rows of an array are left out, and what ``take`` gives.

    Args:
        arrays: (any, d_model), float16 or float32; may be memory maps.
        kept: for each array the rows that count; None: all.
        centre: (d_model,) is added to every row: what was taken away before it was rounded. None: nothing.
    Raises:
        RowsError: no row is left, or the widths differ.
    """

    def __init__(
        self,
        arrays: Sequence[npt.NDArray[np.floating]],
        *,
        kept: Sequence[npt.NDArray[np.int64] | None] | None = None,
        centre: Float32 | None = None,
    ) -> None:
        self._arrays = tuple(arrays)
        self._kept = tuple(kept) if kept is not None else (None,) * len(self._arrays)
        self._ends = np.cumsum(
            [len(array) if rows is None else len(rows) for array, rows in zip(arrays, self._kept, strict=True)]
        )
        widths = {array.shape[1] for array in self._arrays}
        if len(widths) != 1 or not len(self):
            raise RowsError(
                f"{len(self._arrays)} arrays with {len(self)} rows of the widths {sorted(widths)}: at least one row is "
                "needed, and one width. Name more texts, or read them again."
            )
        self._centre = centre

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def d_model(self) -> int:
        """Width of a row."""
        return int(self._arrays[0].shape[1])

    def norms(self) -> npt.NDArray[np.float64]:
        """(n,) norm of each row, read in one pass."""
        found = np.empty(len(self))
        for start in range(0, len(self), _BATCH):
            rows = self.take(np.arange(start, min(start + _BATCH, len(self))))
            found[start : start + len(rows)] = np.linalg.norm(rows, axis=1)
        return found

    def only(self, mask: npt.NDArray[np.bool_]) -> RowPool:
        """These rows; nothing is copied but 8 bytes a row.

        Args:
            mask: (n,), which ones.
        Raises:
            RowsError: none.
        """
        kept = []
        start = 0
        for end, rows in zip(self._ends, self._kept, strict=True):
            chosen = np.flatnonzero(mask[start:end])
            kept.append(chosen if rows is None else rows[chosen])
            start = int(end)
        return RowPool(self._arrays, kept=kept, centre=self._centre)

    def take(self, index: npt.NDArray[np.int64]) -> Float32:
        """These rows, in this order: (len(index), d_model) float32."""
        found = np.empty((len(index), self.d_model), dtype=np.float32)
        places = np.searchsorted(self._ends, index, side="right")
        for place in np.unique(places):
            chosen = places == place
            own = index[chosen] - (self._ends[place - 1] if place else 0)
            rows = self._kept[place]
            found[chosen] = self._arrays[place][own if rows is None else rows[own]]
        return found if self._centre is None else found + self._centre

    def sample(self, count: int, seed: int) -> Float32:
        """At most so many rows, drawn without replacement, in the order in which they lie."""
        index = np.random.default_rng(seed).permutation(len(self))[:count]
        return self.take(np.sort(index))
