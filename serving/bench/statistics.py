"""Paired ratios and their bootstrap intervals. Arithmetic on numbers; knows neither servers nor seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
_MIN_PAIRS = 2


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its interval.

    Attributes:
        point: of all pairs.
        low, high: ends of the bootstrap percentile interval.
    """

    point: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedRatio:
    """How two series that were measured in pairs compare.

    Attributes:
        ratios: one per pair, in order.
        geometric_mean: exp of the mean log ratio: no pair is left out, and swapping the series inverts it.
        median: of the ratios: what a single disturbed pair cannot move.
        confidence: of both intervals.
    """

    ratios: tuple[float, ...]
    geometric_mean: Estimate
    median: Estimate
    confidence: float


def paired_ratio(
    numerator: Sequence[float],
    denominator: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 20_000,
    seed: int = 0,
) -> PairedRatio:
    """Compare two series pair by pair. Whole pairs are drawn with replacement, so what disturbs both cancels.

    Args:
        numerator: positive and finite.
        denominator: likewise; the same position in both is one pair.
        confidence: of the intervals, e.g. 0.95.
        resamples: bootstrap draws.
        seed: of the draws: the same input gives the same interval.
    Raises:
        ValueError: fewer than two pairs, different lengths, or a value that is not positive and finite.
    """
    top, bottom = _positive("numerator", numerator), _positive("denominator", denominator)
    if len(top) != len(bottom):
        raise ValueError(f"{len(top)} values over {len(bottom)}: a pair needs one of each")
    if len(top) < _MIN_PAIRS:
        raise ValueError(f"there are {len(top)} pairs; an interval needs at least {_MIN_PAIRS}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1, e.g. 0.95")
    logs = np.log(top) - np.log(bottom)
    draws = np.random.default_rng(seed).integers(0, len(logs), size=(resamples, len(logs)))
    return PairedRatio(
        ratios=tuple(float(value) for value in np.exp(logs)),
        geometric_mean=_estimate(np.mean, logs, draws, confidence),
        median=_estimate(np.median, logs, draws, confidence),
        confidence=confidence,
    )


def _estimate(
    statistic: Callable[..., Float64], logs: Float64, draws: npt.NDArray[np.int64], confidence: float
) -> Estimate:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(statistic(logs[draws], axis=1), [tail, 1.0 - tail])
    return Estimate(float(np.exp(statistic(logs))), float(np.exp(low)), float(np.exp(high)))


def _positive(name: str, values: Sequence[float]) -> Float64:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.all(np.isfinite(array)) or not np.all(array > 0.0):
        raise ValueError(f"{name} holds a value that is not a positive finite number: a ratio has no meaning then")
    return array
