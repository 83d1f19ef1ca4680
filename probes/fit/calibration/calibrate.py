"""Thresholds from benign requests: what may be promised of the false-positive rate, and with how much confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from probes.aggregate import Aggregator
from probes.card import Calibration, Format, LengthBucket, Stage
from probes.errors import TelltaleError
from probes.fit.rows.example import Example, data_digest
from probes.threshold import ThresholdMethod, exceedances, needed, rate_bound

__all__ = ["CalibrationError", "Promise", "bound_of", "calibrate", "shares", "shortfall"]

Float64 = npt.NDArray[np.float64]
Lengths = npt.NDArray[np.int64]

_LEAST_KEPT = 50
_SHARE_KEPT = 0.06
_NUM_QUANTILES = 101


class CalibrationError(TelltaleError, ValueError):
    """No threshold can be read from these statistics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a threshold is to promise.

    Attributes:
        target_fpr: share of benign requests that may fire.
        confidence: of the statement; a conformal threshold makes none.
        method: how the threshold is found.
    """

    target_fpr: float
    confidence: float = 0.95
    method: ThresholdMethod = ThresholdMethod.PAC

    @property
    def needed(self) -> int:
        """The fewest benign requests that it can rest on."""
        return needed(self.target_fpr, confidence=self.confidence, method=self.method)

    def exceedances(self, num_benign: int) -> int | None:
        """How many of so many benign statistics may lie above the threshold; None if there are too few."""
        return exceedances(num_benign, self.target_fpr, confidence=self.confidence, method=self.method)


def calibrate(
    statistics: Float64,
    examples: Sequence[Example],
    *,
    stage: Stage,
    text_format: Format,
    aggregate: Aggregator,
    target_fpr: float,
    confidence: float,
    method: ThresholdMethod = ThresholdMethod.PAC,
    lengths: Lengths | None = None,
    edges: Sequence[int] = (),
) -> Calibration:
    """The lowest threshold that promises ``target_fpr``; not certified where the requests are too few.

    With too few requests the threshold lies at the largest statistic seen, and the card says that it is not certified.

    Args:
        statistics: (n,), one for each benign request; minus infinity where it is never defined.
        examples: the n requests.
        stage: when the statistic is judged.
        text_format: how the requests were presented.
        aggregate: how token scores became the statistic.
        target_fpr: share of benign requests that may fire.
        confidence: of the statement.
        method: what is promised.
        lengths: (n,) tokens in each read sequence; needed with ``edges``.
        edges: longest lengths of all length buckets but the last; see ``probes.fit.calibration.buckets``. None: one
            threshold.
    Raises:
        CalibrationError: a statistic is NaN, or none is finite.
    """
    if np.isnan(statistics).any() or not np.isfinite(statistics).any():
        raise CalibrationError(
            f"calibration for {stage.value}/{text_format.value}: {int(np.isnan(statistics).sum())} of "
            f"{statistics.size} statistics are NaN; none may be, and at least one must be finite. "
            "Use longer requests or a smaller window."
        )
    promise = Promise(target_fpr=target_fpr, confidence=confidence, method=method)
    threshold, top, certified = _limit(statistics, promise)
    return Calibration(
        stage=stage,
        format=text_format,
        aggregate=aggregate,
        threshold=threshold,
        target_fpr=target_fpr,
        confidence=confidence,
        method=method,
        num_benign=statistics.size,
        top_scores=top,
        quantiles=_quantiles(statistics),
        data_digest=data_digest(examples),
        certified=certified,
        buckets=_buckets(statistics, lengths, edges, promise) if lengths is not None and len(edges) else (),
    )


def shares(total_fpr: float, weights: Sequence[float]) -> list[float]:
    """A rate for each of several detectors, so that all together keep the total (Bonferroni).

    A request is a false alarm if any of them fires: the rate of that is at most the sum of theirs, however they depend
    on each other.

    Args:
        total_fpr: share of benign requests that may fire any of them.
        weights: positive, one for each detector.
    Raises:
        CalibrationError: a weight is not positive.
    """
    if not weights or min(weights) <= 0:
        raise CalibrationError(f"weights are {list(weights)}; each must be above 0: a detector needs a share to fire.")
    return [total_fpr * weight / sum(weights) for weight in weights]


def bound_of(calibration: Calibration | LengthBucket, promise: Promise) -> float:
    """The upper Clopper-Pearson bound of the rate of false alarms at a calibrated threshold."""
    allowed = promise.exceedances(calibration.num_benign)
    return rate_bound(allowed or 0, calibration.num_benign, confidence=promise.confidence)


def shortfall(calibration: Calibration) -> str:
    """What is missing, for people; empty where the requests suffice for what the method promises."""
    promise = Promise(target_fpr=calibration.target_fpr, confidence=calibration.confidence, method=calibration.method)
    missing = promise.needed - calibration.num_benign
    if calibration.certified or (missing <= 0 and calibration.method is ThresholdMethod.CONFORMAL):
        return ""
    stated = f" at {calibration.confidence:.0%} confidence" if calibration.method is ThresholdMethod.PAC else ""
    return (
        f"not certifiable: {max(1, missing)} more benign requests needed for a "
        f"false-positive rate of {calibration.target_fpr:g}{stated} ({calibration.num_benign} given)"
    )


def _limit(statistics: Float64, promise: Promise) -> tuple[float, tuple[float, ...], bool]:
    """Threshold, largest statistics, and whether the threshold is certified."""
    count = statistics.size
    allowed = promise.exceedances(count)
    kept = max(_LEAST_KEPT, math.ceil(_SHARE_KEPT * count), (allowed or 0) + 1)
    largest = np.sort(statistics[np.isfinite(statistics)])[::-1][:kept]
    top = tuple(float(value) for value in largest)
    # Requests whose statistic is never defined cannot fire: with fewer defined ones than may fire, all may.
    threshold = top[min(allowed or 0, len(top) - 1)]
    return threshold, top, allowed is not None and promise.method is ThresholdMethod.PAC


def _quantiles(statistics: Float64) -> tuple[float, ...]:
    """The benign statistics in brief; those that are never defined are no number, and live ones are none either."""
    finite = statistics[np.isfinite(statistics)]
    levels = np.linspace(0.0, 1.0, _NUM_QUANTILES)
    return tuple(float(value) for value in np.quantile(finite, levels, method="inverted_cdf"))


def _buckets(statistics: Float64, lengths: Lengths, edges: Sequence[int], promise: Promise) -> tuple[LengthBucket, ...]:
    of_bucket = np.searchsorted(np.array(edges), lengths, side="left")
    found = []
    for number, end in enumerate([*edges, None]):
        inside = statistics[of_bucket == number]
        threshold, top, certified = _limit(inside, promise)
        found.append(
            LengthBucket(
                max_tokens=end, threshold=threshold, num_benign=inside.size, certified=certified, top_scores=top
            )
        )
    return tuple(found)
