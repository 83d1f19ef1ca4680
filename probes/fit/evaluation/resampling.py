"""How often each row stands in each bootstrap resample, whole clusters at a time. Knows no figure and no text."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["RESAMPLES", "Counts", "draw_clusters"]

RESAMPLES = 1000

Counts = npt.NDArray[np.uint16]


def draw_clusters(
    labels: npt.NDArray[np.int64], groups: Sequence[Hashable] | None, *, seed: int, resamples: int = RESAMPLES
) -> Counts:
    """Draw clusters with replacement (Field and Welsh, 2007), stratified by the labels that they hold.

    Clusters that hold both labels, one alone and the other alone are drawn apart, so both labels stand in every
    resample. Where all rows of a stratum are one cluster, its rows are drawn instead: the interval is then one *given*
    that cluster, and says nothing about others.

    Args:
        labels: (n,), 0 or 1.
        groups: cluster of each row; None: every row is its own.
        seed: of the draw; the same for scorers that are compared.
        resamples: R.
    Returns: (R, n): how often each row was drawn.
    """
    clusters = np.arange(labels.size) if groups is None else _numbered(groups)
    count = int(clusters.max()) + 1 if clusters.size else 0
    holds = np.stack([np.bincount(clusters[labels == label], minlength=count) > 0 for label in (1, 0)])
    generator = np.random.default_rng(seed)
    drawn = np.empty((resamples, labels.size), dtype=np.uint16)
    for stratum in ((True, False), (False, True), (True, True)):
        members = np.flatnonzero((holds == np.array(stratum)[:, None]).all(axis=0))
        rows = np.flatnonzero(np.isin(clusters, members))
        if members.size == 0:
            continue
        if members.size == 1:
            for label in (1, 0):
                own = rows[labels[rows] == label]
                if own.size:
                    drawn[:, own] = _multinomial(generator, own.size, resamples)
            continue
        drawn[:, rows] = _multinomial(generator, members.size, resamples)[:, np.searchsorted(members, clusters[rows])]
    return drawn


def _multinomial(generator: np.random.Generator, count: int, resamples: int) -> Counts:
    return generator.multinomial(count, np.full(count, 1.0 / count), size=resamples).astype(np.uint16)


def _numbered(groups: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """Numbers in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
