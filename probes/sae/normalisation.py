"""What some sparse autoencoders divide each row by before they encode it. Arithmetic on two numbers of a row."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

LAYER_NORM_EPSILON = 1e-5
"""Added to the standard deviation by SAELens."""


class Normalisation(StrEnum):
    """How a row is brought to a common scale; a constant factor is none of these, it is folded into the weights."""

    NONE = "none"
    RMS = "rms"
    """``x sqrt(d) / |x|``: SAELens' ``constant_norm_rescale``."""
    LAYER = "layer"
    """``(x - mean) / (std + 1e-5)`` with the unbiased standard deviation: SAELens' ``layer_norm``."""


def row_scale(normalisation: Normalisation, squared_norm: Float64, mean: Float64, d_model: int) -> Float64:
    """What each row is divided by.

    Args:
        normalisation: the kind.
        squared_norm: (n,) sum of the squares of each row.
        mean: (n,) mean over the dimensions of each row; read by ``LAYER`` alone.
        d_model: width of a row, 2 or more.
    Returns: (n,) above 0; a row of zeros gives the smallest positive number in the place of 0 for ``RMS``.
    """
    if normalisation is Normalisation.NONE:
        return np.ones_like(squared_norm)
    if normalisation is Normalisation.RMS:
        rms: Float64 = np.maximum(np.sqrt(squared_norm / d_model), np.finfo(np.float64).tiny)
        return rms
    variance = np.maximum(squared_norm - d_model * mean**2, 0.0) / (d_model - 1)
    deviation: Float64 = np.sqrt(variance) + LAYER_NORM_EPSILON
    return deviation
