"""Whether probabilities mean what they say: calibration error, Brier score, reliability curve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["BINS", "Reliability", "reliability"]

Float64 = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

BINS = 15


@dataclass(frozen=True, slots=True)
class Reliability:
    """Of the bins that hold rows, in rising order of their probabilities.

    Attributes:
        mean_probability: (bins,), what was said.
        share_positive: (bins,), what was true.
        rows: (bins,), how many.
        brier: mean squared distance of probability and label (Brier, 1950).
    """

    mean_probability: Float64
    share_positive: Float64
    rows: npt.NDArray[np.int64]
    brier: float

    @property
    def error(self) -> float:
        """Expected calibration error (Naeini et al., 2015): mean distance of the two over rows, 0 to 1."""
        gaps = np.abs(self.mean_probability - self.share_positive)
        return float(gaps @ self.rows / self.rows.sum())


def reliability(probability: Float64, labels: Labels, *, bins: int = BINS) -> Reliability:
    """Sort rows into bins of equal mass by their probability; equal probabilities stand in one bin.

    Args:
        probability: (n,), 0 to 1.
        labels: (n,), 0 or 1.
        bins: at most so many.
    """
    edges = np.percentile(probability, 100 * np.linspace(0, 1, bins + 1))
    place = np.searchsorted(edges[1:-1], probability)
    rows = np.bincount(place, minlength=bins)
    filled = rows > 0
    said = np.bincount(place, weights=probability, minlength=bins)[filled] / rows[filled]
    true = np.bincount(place, weights=labels, minlength=bins)[filled] / rows[filled]
    return Reliability(said, true, rows[filled].astype(np.int64), float(np.mean((probability - labels) ** 2)))
