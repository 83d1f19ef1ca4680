"""Means and scatter of paired activations, gathered batch by batch so that none have to be kept. Knows no model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Float64", "Moments"]

Float64 = npt.NDArray[np.float64]


class Moments:
    """First and second moments of rows (new, old), joined; float64, by the pairwise update of Chan et al. (1983).

    Memory: (2 d_model)^2 float64, whatever the number of rows.

    Args:
        width: d_model.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.count = 0
        self._mean = np.zeros(2 * width)
        self._scatter = np.zeros((2 * width, 2 * width))

    def add(self, new: npt.NDArray[np.floating], old: npt.NDArray[np.floating]) -> None:
        """Take in rows of both builds: (n, d_model) each, the same tokens in the same order."""
        rows = np.concatenate([new, old], axis=1).astype(np.float64)
        if len(rows) == 0:
            return
        mean = rows.mean(axis=0)
        centred = rows - mean
        self._merge(len(rows), mean, centred.T @ centred)

    def joined(self, other: Moments) -> Moments:
        """The moments of the rows of both."""
        found = Moments(self.width)
        for part in (self, other):
            if part.count:
                found._merge(part.count, part._mean, part._scatter)
        return found

    @property
    def new_mean(self) -> Float64:
        """(d_model,)."""
        return self._mean[: self.width]

    @property
    def old_mean(self) -> Float64:
        """(d_model,)."""
        return self._mean[self.width :]

    @property
    def new_scatter(self) -> Float64:
        """(d_model, d_model): sum over rows of the products of centred new activations."""
        return self._scatter[: self.width, : self.width]

    @property
    def old_scatter(self) -> Float64:
        """(d_model, d_model), of old activations."""
        return self._scatter[self.width :, self.width :]

    @property
    def cross_scatter(self) -> Float64:
        """(d_model, d_model): new times old."""
        return self._scatter[: self.width, self.width :]

    def _merge(self, count: int, mean: Float64, scatter: Float64) -> None:
        total = self.count + count
        gap = mean - self._mean
        self._scatter += scatter + np.outer(gap, gap) * (self.count * count / total)
        self._mean = self._mean + gap * (count / total)
        self.count = total
