"""How many tokens pass before a running statistic fires. Knows no model: numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Delay", "detection_delay", "first_crossing"]

Float64 = npt.NDArray[np.float64]

_LATE = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Delay:
    """Over positive requests.

    Attributes:
        requests: that were watched.
        detected: of them, with a crossing at the onset or later.
        early: with a crossing before their onset: an alarm, but not at what it is to find.
        median, late, mean: tokens from the onset to the crossing, over the detected: 0 is the onset's own token;
            ``late`` is the 90th percentile. None where nothing was detected.
    """

    requests: int
    detected: int
    early: int
    median: float | None
    late: float | None
    mean: float | None


def first_crossing(running: Float64, threshold: float) -> int | None:
    """Index of the first value of (T,) that lies above the threshold, strictly; None if there is none."""
    above = running > threshold
    return int(np.argmax(above)) if above.any() else None


def detection_delay(crossings: Sequence[int | None], onsets: Sequence[int]) -> Delay:
    """Sum up where requests fired.

    Args:
        crossings: index of the first read token at which each request fires; None: it never does.
        onsets: index of the read token from which on each request is positive; 0 where nobody has marked one.
    """
    tokens = [at - onset for at, onset in zip(crossings, onsets, strict=True) if at is not None]
    delays = np.array([count for count in tokens if count >= 0], dtype=np.float64)
    return Delay(
        requests=len(crossings),
        detected=delays.size,
        early=len(tokens) - delays.size,
        median=float(np.median(delays)) if delays.size else None,
        late=float(np.percentile(delays, _LATE)) if delays.size else None,
        mean=float(delays.mean()) if delays.size else None,
    )
