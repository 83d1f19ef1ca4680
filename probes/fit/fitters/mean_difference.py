"""Difference of means: from the benign rows' centre to the others' (Marks and Tegmark, 2023)."""

from __future__ import annotations

import numpy as np

from probes.fit.fitters.base import Fitter
from probes.fit.training.linear_probe import Floats, Labels, LinearProbe


class MeanDifference(Fitter):
    """The direction from one class's mean to the other's.

    It takes no account of how the dimensions vary together, and cannot overfit it. A score is the distance from the
    middle between the means, in units of the classes' own spread along the direction.
    """

    kind = "mean_difference"

    def fit(self, features: Floats, labels: Labels) -> LinearProbe:
        """See ``Fitter.fit``."""
        rows = features.astype(np.float64)
        low, high = (rows[labels == label] for label in (0, 1))
        means = low.mean(axis=0), high.mean(axis=0)
        direction = means[1] - means[0]
        direction /= max(float(np.linalg.norm(direction)), np.finfo(np.float64).tiny)
        spread = np.sqrt(np.mean([np.var(part @ direction) for part in (low, high)])) or 1.0
        middle = (means[0] + means[1]) / 2
        ones = np.ones(rows.shape[1], dtype=np.float32)
        return LinearProbe((direction / spread).astype(np.float32), middle.astype(np.float32), ones, 0.0)
