"""Thresholds that state a false-positive rate with a confidence. Arithmetic on counts and sorted scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import bdtr


def allowed_exceedances(num_benign: int, target_fpr: float, *, confidence: float = 0.95) -> int | None:
    """How many of ``num_benign`` benign statistics may lie above a threshold that promises ``target_fpr``.

    The largest k with P(Binomial(num_benign, target_fpr) <= k) <= 1 - confidence: had the true rate been above the
    target, seeing k or fewer exceedances would have been that unlikely.

    Returns: k, or None if even k = 0 proves nothing (too few requests; see ``benign_needed``).
    """
    _check(target_fpr, confidence)
    risk = 1.0 - confidence
    if num_benign < benign_needed(target_fpr, confidence=confidence):
        return None
    low, high = 0, num_benign
    while low < high:
        middle = (low + high + 1) // 2
        if bdtr(middle, num_benign, target_fpr) <= risk:
            low = middle
        else:
            high = middle - 1
    return low


def benign_needed(target_fpr: float, *, confidence: float = 0.95) -> int:
    """The fewest benign requests, none of them above the threshold, that prove ``target_fpr``: 299 for 1 % at 95 %."""
    _check(target_fpr, confidence)
    return math.ceil(math.log(1.0 - confidence) / math.log1p(-target_fpr))


def threshold_for(
    top_scores: Sequence[float], num_benign: int, target_fpr: float, *, confidence: float = 0.95
) -> float | None:
    """The lowest threshold that promises ``target_fpr``, from the largest benign statistics.

    Args:
        top_scores: the largest statistics, largest first; at least k + 1 of them are needed.
        num_benign: how many benign requests were scored in all.
        target_fpr: share of benign requests that may fire.
        confidence: of the statement.
    Returns: the threshold (fire above it, strictly), or None if not certifiable or ``top_scores`` is too short.
    """
    allowed = allowed_exceedances(num_benign, target_fpr, confidence=confidence)
    if allowed is None or allowed >= len(top_scores):
        return None
    return float(top_scores[allowed])


def _check(target_fpr: float, confidence: float) -> None:
    if not 0.0 < target_fpr < 1.0:
        raise ValueError(f"target_fpr is {target_fpr}; it must lie between 0 and 1, e.g. 0.01 for 1 %")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1, e.g. 0.95")
