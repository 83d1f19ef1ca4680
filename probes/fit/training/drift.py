"""Fits the direction along which activations move when a text takes the model off its task."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from probes.fit.fitters import Fitter
from probes.fit.training.linear_probe import Floats, Labels

__all__ = ["fit_drift"]


def fit_drift(before: Floats, after: Floats, labels: Labels, *, fitter: Fitter) -> dict[str, npt.NDArray[np.float32]]:
    """Direction and scale, as an artifact of kind ``drift`` holds them.

    What the fitter's mean and bias say is left out: a rule's threshold says it.

    Args:
        before: (n, d_model), of each request the row before the text that nobody vouches for.
        after: (n, d_model), the last row of that text.
        labels: (n,), 1 where the text took the model off its task; both present.
        fitter: of the direction in the differences (Abdelnabi et al., arXiv 2406.00799).
    """
    probe = fitter.fit(after.astype(np.float64) - before.astype(np.float64), labels)
    return {"direction": probe.direction, "scale": probe.scale}
