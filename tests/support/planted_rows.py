"""Rows of two classes that differ along one direction, among dimensions of very different size."""

from __future__ import annotations

import numpy as np


def planted(count: int = 4000, width: int = 24, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """(count, width) float32 features and (count,) labels, as many of each."""
    generator = np.random.default_rng(seed)
    spread = generator.uniform(0.5, 20.0, width)
    truth = generator.standard_normal(width)
    labels = (np.arange(count) % 2).astype(np.int64)
    features = generator.standard_normal((count, width)) * spread
    features += np.outer(labels - 0.5, truth / np.linalg.norm(truth) * 3.0) * spread
    return features.astype(np.float32), labels
