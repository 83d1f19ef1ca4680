"""Thresholds that state a false-positive rate. Arithmetic on counts and sorted scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from fractions import Fraction

from scipy.special import bdtr, betaincinv


class ThresholdMethod(StrEnum):
    """What is promised of the rate of benign requests above a threshold."""

    PAC = "pac"
    """It is at most the target, and this calibration is wrong about that only as often as the confidence allows."""
    CONFORMAL = "conformal"
    """It is at most the target in the mean over calibrations; of this one, nothing is promised."""


def exceedances(
    num_benign: int,
    target_fpr: float,
    *,
    confidence: float = 0.95,
    method: ThresholdMethod = ThresholdMethod.PAC,
) -> int | None:
    """How many benign statistics may lie above a threshold, by the method; None if too few were scored."""
    if method is ThresholdMethod.CONFORMAL:
        return conformal_exceedances(num_benign, target_fpr)
    return allowed_exceedances(num_benign, target_fpr, confidence=confidence)


def needed(target_fpr: float, *, confidence: float = 0.95, method: ThresholdMethod = ThresholdMethod.PAC) -> int:
    """The fewest benign requests that the method can work with."""
    if method is ThresholdMethod.CONFORMAL:
        return conformal_needed(target_fpr)
    return benign_needed(target_fpr, confidence=confidence)


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


def conformal_exceedances(num_benign: int, target_fpr: float) -> int | None:
    """How many benign statistics lie above the split-conformal threshold, at most.

    The threshold is the ceil((n + 1)(1 - target_fpr))-th smallest of n (Vovk, Gammerman & Shafer, 2005).

    Returns: n minus that rank, or None if the rank is n + 1 (see ``conformal_needed``).
    """
    rank = math.ceil((num_benign + 1) * (1 - _exact(target_fpr)))
    return num_benign - rank if rank <= num_benign else None


def conformal_needed(target_fpr: float) -> int:
    """The fewest benign requests that a conformal threshold exists for: 99 for 1 %."""
    return math.ceil(1 / _exact(target_fpr)) - 1


def rate_bound(above: int, num_benign: int, *, confidence: float = 0.95) -> float:
    """The upper Clopper-Pearson bound (1934), one-sided: no larger rate is compatible with what was seen.

    Args:
        above: benign statistics above the threshold; where the threshold is an order statistic, its rank, ties or not.
        num_benign: how many were scored.
        confidence: of the statement.
    """
    if above >= num_benign:
        return 1.0
    return float(betaincinv(above + 1, num_benign - above, confidence))


def threshold_for(
    top_scores: Sequence[float],
    num_benign: int,
    target_fpr: float,
    *,
    confidence: float = 0.95,
    method: ThresholdMethod = ThresholdMethod.PAC,
) -> float | None:
    """The lowest threshold that promises ``target_fpr``, from the largest benign statistics.

    Args:
        top_scores: the largest statistics, largest first; one more of them is needed than may lie above.
        num_benign: how many benign requests were scored in all.
        target_fpr: share of benign requests that may fire.
        confidence: of the statement; a conformal threshold makes none.
        method: what is promised.
    Returns: the threshold (fire above it, strictly), or None if not certifiable or ``top_scores`` is too short.
    """
    allowed = exceedances(num_benign, target_fpr, confidence=confidence, method=method)
    if allowed is None or allowed >= len(top_scores):
        return None
    return float(top_scores[allowed])


def _exact(target_fpr: float) -> Fraction:
    """The decimal number that was written, so that 0.01 of 100 is 1."""
    _check(target_fpr)
    return Fraction(str(float(target_fpr)))


def _check(target_fpr: float, confidence: float = 0.95) -> None:
    if not 0.0 < target_fpr < 1.0:
        raise ValueError(f"target_fpr is {target_fpr}; it must lie between 0 and 1, e.g. 0.01 for 1 %")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1, e.g. 0.95")
