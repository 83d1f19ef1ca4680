"""A linear probe as numbers: what every fitter gives, and what an artifact of kind ``linear`` holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Float64", "Floats", "Labels", "LinearProbe"]

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

_SMALLEST_SCALE = 1e-6


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """score = direction . (s - mean) / scale + bias.

    Attributes:
        direction: (d_model,) float32, in standardised units.
        mean: (d_model,) float32.
        scale: (d_model,) float32, positive.
        bias: of the score.
    """

    direction: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    bias: float

    def tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """As an artifact of kind ``linear`` holds them."""
        return {
            "direction": self.direction,
            "mean": self.mean,
            "scale": self.scale,
            "bias": np.array([self.bias], dtype=np.float32),
        }

    @property
    def weight(self) -> Float64:
        """(d_model,), the standardisation folded into it."""
        folded: Float64 = self.direction.astype(np.float64) / self.scale.astype(np.float64)
        return folded

    @property
    def constant(self) -> float:
        """What is added: the bias, and the mean's own part."""
        return float(np.float32(self.bias)) - float(self.mean.astype(np.float64) @ self.weight)

    def score(self, features: Floats) -> Float64:
        """Map (n, d_model) to (n,), as the served detector does: constants folded in float64."""
        scores: Float64 = features.astype(np.float64) @ self.weight + self.constant
        return scores


def standard_units(features: Floats) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Mean and spread of each dimension, (d_model,) float32 each; a dimension without spread has the spread 1."""
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    scale = features.std(axis=0, dtype=np.float64).astype(np.float32)
    return mean, np.where(scale > _SMALLEST_SCALE, scale, np.float32(1.0)).astype(np.float32)
