"""How well each latent alone tells two labels apart, and how well the best of so many would by chance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

__all__ = ["Separation", "separate"]

_LATENTS_AT_ONCE = 4096

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Separation:
    """Of each latent, on the rows that it is selected by; arrays of shape (width,).

    Attributes:
        auroc: chance that a request with label 1 has more of it; ties count half.
        p: share of permutations of the labels under which the *best* latent does as well (max-statistic, Westfall and
            Young 1993): the chance of one false discovery or more among all latents is at most that. Requests are
            permuted one by one, as if they had nothing to do with each other.
    """

    auroc: Float64
    p: Float64

    def best(self, count: int) -> Int64:
        """Latents with the highest AUROC, best first; of equal ones the lower number."""
        return np.argsort(-self.auroc, kind="stable")[:count].astype(np.int64)


def separate(features: Float32, labels: Int64, *, permutations: int, seed: int) -> Separation:
    """Measure all latents, and the best of them under permuted labels.

    Args:
        features: (requests, width), one number of each request and latent.
        labels: (requests,), 0 or 1, both present.
        permutations: how many.
        seed: of the permutations.
    """
    generator = np.random.default_rng(seed)
    drawn = np.stack([labels, *(generator.permutation(labels) for _ in range(permutations))]).astype(np.float64)
    own, best = [], np.zeros(permutations)
    for ranks in _ranks(features):
        areas = _areas(drawn, ranks)
        own.append(areas[0])
        best = np.maximum(best, areas[1:].max(axis=1))
    auroc = np.concatenate(own)
    above = len(best) - np.searchsorted(np.sort(best), auroc - 1e-12, side="left")
    return Separation(auroc, (1 + above) / (1 + permutations))


def _ranks(features: Float32) -> Iterator[Float64]:
    for start in range(0, features.shape[1], _LATENTS_AT_ONCE):
        yield np.asarray(rankdata(features[:, start : start + _LATENTS_AT_ONCE], axis=0), dtype=np.float64)


def _areas(labels: Float64, ranks: Float64) -> Float64:
    """(labellings, latents) AUROC, from sums of ranks (Mann and Whitney)."""
    positives = labels.sum(axis=1, keepdims=True)
    areas: Float64 = (labels @ ranks - positives * (positives + 1) / 2) / (positives * (labels.shape[1] - positives))
    return areas
