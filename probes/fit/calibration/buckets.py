"""Where thresholds by length begin and end: only where a statistic grows with length, and each bucket can certify."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from probes.card import Stage

__all__ = ["edges_where_it_grows", "even_edges", "grows_with_length", "merged_edges"]

_MOST = 8
_LEAST_CORRELATION = 0.1
_SIGNIFICANT = 0.01


def grows_with_length(statistics: npt.NDArray[np.float64], lengths: npt.NDArray[np.int64]) -> bool:
    """Whether longer benign requests have larger statistics: Spearman's rank correlation, one-sided.

    It must be significant, and at least 0.1: a bucket has fewer requests than all together, so that its threshold lies
    higher than it would have to. A faint growth is not worth that.

    Args:
        statistics: (n,); those that are not finite are left out.
        lengths: (n,) tokens in each read sequence.
    """
    defined = np.isfinite(statistics)
    scores, tokens = statistics[defined], lengths[defined]
    if scores.size < 3 or np.ptp(scores) == 0 or np.ptp(tokens) == 0:  # noqa: PLR2004 - no rank correlation of fewer
        return False
    found = spearmanr(scores, tokens, alternative="greater")
    return bool(found.statistic >= _LEAST_CORRELATION and found.pvalue < _SIGNIFICANT)


def edges_where_it_grows(
    statistics: npt.NDArray[np.float64], lengths: npt.NDArray[np.int64], *, stage: Stage, needed: int
) -> tuple[int, ...]:
    """``even_edges`` where the statistic grows with length; else, and at the stage ``stream``, none.

    How long a reply will be is not known while it is judged token by token.

    Args:
        statistics: (n,).
        lengths: (n,) tokens in each read sequence.
        stage: when the statistic is judged.
        needed: the fewest requests that certify a bucket.
    """
    if stage is Stage.STREAM or not grows_with_length(statistics, lengths):
        return ()
    return even_edges(statistics, lengths, needed=needed)


def even_edges(statistics: npt.NDArray[np.float64], lengths: npt.NDArray[np.int64], *, needed: int) -> tuple[int, ...]:
    """Edges of up to eight buckets with about as many requests each, none with fewer than ``needed``.

    They depend on the lengths alone, so that within a bucket the statistics are a sample like any other.

    Args:
        statistics: (n,); requests whose statistic is not finite count for no bucket.
        lengths: (n,) tokens in each read sequence.
        needed: the fewest requests that certify a bucket.
    Returns: the longest length of every bucket but the last; empty if there is but one bucket.
    """
    tokens = lengths[np.isfinite(statistics)]
    count = min(_MOST, tokens.size // needed)
    if count < 2:  # noqa: PLR2004 - one bucket is none
        return ()
    wanted = np.quantile(tokens, np.arange(1, count) / count, method="inverted_cdf")
    return merged_edges(statistics, lengths, sorted({int(edge) for edge in wanted}), needed=needed)


def merged_edges(
    statistics: npt.NDArray[np.float64], lengths: npt.NDArray[np.int64], edges: Sequence[int], *, needed: int
) -> tuple[int, ...]:
    """Of some edges those that leave ``needed`` requests to each bucket: a smaller bucket is joined with the next.

    Args:
        statistics: (n,); requests whose statistic is not finite count for no bucket.
        lengths: (n,) tokens in each read sequence.
        edges: ascending; the longest length of every bucket but the last.
        needed: the fewest requests that certify a bucket.
    """
    tokens = np.sort(lengths[np.isfinite(statistics)])
    kept: list[int] = []
    before = 0
    for edge in edges:
        up_to = int(np.searchsorted(tokens, edge, side="right"))
        if up_to - before >= needed and tokens.size - up_to >= needed:
            kept.append(edge)
            before = up_to
    return tuple(kept)
