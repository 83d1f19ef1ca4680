"""Rows in normalised coordinates: their mean is 0 and their mean square d_model; knows no model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.errors import TelltaleError

__all__ = ["Scaling", "ScalingError"]


class ScalingError(TelltaleError, ValueError):
    """Rows cannot be normalised."""


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """``x' = factor (x - mean)``. One factor for all dimensions, so that directions stay what they are.

    Attributes:
        mean: (d_model,) float32.
        factor: above 0.
    """

    mean: npt.NDArray[np.float32]
    factor: float

    @classmethod
    def of(cls, rows: npt.NDArray[np.float32]) -> Scaling:
        """Of (n, d_model) rows.

        Raises:
            ScalingError: they are all the same, or not finite.
        """
        exact = rows.astype(np.float64)
        mean = exact.mean(axis=0)
        variance = float(np.square(exact - mean).sum(axis=1).mean())
        if not math.isfinite(variance) or variance <= 0:
            raise ScalingError(
                f"{len(rows)} rows with a variance of {variance}: they are all the same, or not finite. Use rows of "
                "different tokens, and a tap where the model's activations are finite."
            )
        return cls(mean.astype(np.float32), math.sqrt(rows.shape[1] / variance))

    def apply(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """(n, d_model) rows, normalised."""
        return (rows - self.mean) * np.float32(self.factor)
