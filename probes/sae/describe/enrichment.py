"""Which latents are active in one label of a set more often than in the other: odds ratios and Fisher's exact test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import false_discovery_control, hypergeom

__all__ = ["Enrichment", "enrich"]

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Enrichment:
    """Of each latent in the requests with label 1; arrays of shape (width,).

    Attributes:
        positives: requests with label 1 in which the latent is active.
        negatives: the same with label 0.
        num_positives, num_negatives: requests of each label.
        odds_ratio: with 1/2 added to each cell (Haldane 1956, Anscombe 1956), so that it is finite.
        p: of Fisher's exact test, one-sided: as many positives or more, given the margins.
        q: the false discovery rate at which it would be called enriched, over all latents (Benjamini and Hochberg
            1995).
    """

    positives: Int64
    negatives: Int64
    num_positives: int
    num_negatives: int
    odds_ratio: Float64
    p: Float64
    q: Float64


def enrich(active: npt.NDArray[np.bool_], labels: Int64) -> Enrichment:
    """Test every latent.

    Args:
        active: (requests, width), whether a latent is active anywhere in a request.
        labels: (requests,), 0 or 1.
    """
    num_positives = int(labels.sum())
    num_negatives = len(labels) - num_positives
    positives = active[labels == 1].sum(axis=0, dtype=np.int64)
    negatives = active[labels == 0].sum(axis=0, dtype=np.int64)
    odds = ((positives + 0.5) * (num_negatives - negatives + 0.5)) / (
        (negatives + 0.5) * (num_positives - positives + 0.5)
    )
    p = hypergeom.sf(positives - 1, len(labels), positives + negatives, num_positives)
    p = np.clip(np.asarray(p, dtype=np.float64), 0.0, 1.0)
    return Enrichment(
        positives, negatives, num_positives, num_negatives, odds, p, np.asarray(false_discovery_control(p))
    )
