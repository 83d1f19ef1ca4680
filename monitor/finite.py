"""Which rows of a step are finite, asked so that nearly every step is answered at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from monitor.request import Float64, Index


def finite_rows(readouts: npt.NDArray[np.float32], scores: Float64, used: Index) -> npt.NDArray[np.bool_]:
    """Whether each row can be judged.

    Args:
        readouts: (n, width of the bank).
        scores: (n, detectors) of them.
        used: columns of the readouts that something is read in; of the others no value matters.
    Returns: (n,).
    """
    # A sum is finite only if all its terms are.
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(np.einsum("rc->", readouts)) and np.isfinite(np.einsum("rc->", scores)):
            return np.ones(len(readouts), dtype=bool)
        seen = np.einsum("rc->r", readouts if len(used) == readouts.shape[1] else readouts.take(used, axis=1))
        return np.asarray(np.isfinite(seen) & np.isfinite(np.einsum("rc->r", scores)))
