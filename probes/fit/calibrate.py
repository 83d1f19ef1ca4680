"""Thresholds from benign requests: what may be promised of the false-positive rate, and with how much confidence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from probes.aggregate import Aggregator
from probes.card import Calibration, Format, Stage
from probes.errors import TelltaleError
from probes.fit.example import Example, data_digest
from probes.threshold import allowed_exceedances, benign_needed, threshold_for

__all__ = ["CalibrationError", "calibrate", "shortfall"]

_LEAST_KEPT = 50
_SHARE_KEPT = 0.06


class CalibrationError(TelltaleError, ValueError):
    """No threshold can be read from these statistics."""


def calibrate(
    statistics: npt.NDArray[np.float64],
    examples: Sequence[Example],
    *,
    stage: Stage,
    text_format: Format,
    aggregate: Aggregator,
    target_fpr: float,
    confidence: float,
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
    Raises:
        CalibrationError: a statistic is NaN, or none is finite.
    """
    if np.isnan(statistics).any() or not np.isfinite(statistics).any():
        raise CalibrationError(
            f"calibration for {stage.value}/{text_format.value}: {int(np.isnan(statistics).sum())} of "
            f"{statistics.size} statistics are NaN; none may be, and at least one must be finite. "
            "Use longer requests or a smaller window."
        )
    count = statistics.size
    kept = max(_LEAST_KEPT, math.ceil(_SHARE_KEPT * count), (allowed_exceedances(count, target_fpr) or 0) + 1)
    largest = np.sort(statistics[np.isfinite(statistics)])[::-1][:kept]
    top = tuple(float(value) for value in largest)
    threshold = threshold_for(top, count, target_fpr, confidence=confidence)
    return Calibration(
        stage=stage,
        format=text_format,
        aggregate=aggregate,
        threshold=top[0] if threshold is None else threshold,
        target_fpr=target_fpr,
        confidence=confidence,
        num_benign=count,
        top_scores=top,
        data_digest=data_digest(examples),
        certified=threshold is not None,
    )


def shortfall(calibration: Calibration) -> str:
    """What is missing, for people; empty for a certified calibration."""
    if calibration.certified:
        return ""
    needed = benign_needed(calibration.target_fpr, confidence=calibration.confidence)
    return (
        f"not certifiable: {max(1, needed - calibration.num_benign)} more benign requests needed for a "
        f"false-positive rate of {calibration.target_fpr:g} at {calibration.confidence:.0%} confidence "
        f"({calibration.num_benign} given)"
    )
