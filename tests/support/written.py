"""Two steers after the first layer, one that adds and one that reads first: as ours, and as plain arithmetic."""

from __future__ import annotations

import numpy as np
import torch

from probes.steering.ablate import Ablate
from probes.steering.add import Add
from probes.steering.base import Vector
from probes.steering.steer import Positions, Steer
from probes.taps import Tap

STRENGTH, MEDIAN_NORM, MEAN = 0.75, 4.0, 0.5
DOSE = STRENGTH * MEDIAN_NORM
SKIP = 1


def _directions(d_model: int) -> list[np.ndarray]:
    generator = np.random.default_rng(13)
    return [row / np.linalg.norm(row) for row in generator.normal(size=(2, d_model))]


def two_steers(d_model: int) -> list[Steer]:
    """They write to all rows but the first."""
    operators = Add(strength=STRENGTH), Ablate(strength=1.0)
    vectors = [Vector(direction, median_norm=MEDIAN_NORM, mean=MEAN, ceiling=1.0) for direction in _directions(d_model)]
    return [
        Steer(operator.kind, Tap(0), operator.update(vector, max_dose=1e6), Positions.ALL, SKIP, MEDIAN_NORM)
        for operator, vector in zip(operators, vectors, strict=True)
    ]


def edited(stream: torch.Tensor) -> torch.Tensor:
    """(..., tokens, d_model) after both, by their definitions."""
    added, removed = (torch.from_numpy(row).to(stream.dtype) for row in _directions(stream.shape[-1]))
    change = DOSE * added - ((stream @ removed) - MEAN)[..., None] * removed
    change[..., :SKIP, :] = 0
    return stream + change
