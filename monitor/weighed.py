"""A weighted sum of statistics, and when it fires. Plain data and arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from monitor.check import LengthLimits
from monitor.types import Role
from probes.card import Format, Stage

Float64 = npt.NDArray[np.float64]
FORMATS = tuple(Format)
"""Formats by their number in arrays."""


@dataclass(frozen=True, slots=True, order=True)
class Logistic:
    """Platt scaling: 1 / (1 + exp(-(slope * statistic + intercept))) (Platt, 1999)."""

    slope: float
    intercept: float


@dataclass(frozen=True, slots=True)
class Term:
    """What is added up.

    Attributes:
        check: position in the plan of the check whose statistic it is.
        name: of its detector.
        weight: its factor.
        scaling: per format, how the statistic becomes a probability; None adds up the statistic itself.
    """

    check: int
    name: str
    weight: float
    scaling: Mapping[Format, Logistic] | None = None


@dataclass(frozen=True, slots=True)
class WeighedCheck:
    """The sum of ``weight * statistic`` over its terms, and when it fires. It stands beside the plan's checks.

    At the stage stream each statistic is the maximum so far, and so the sum only rises.

    Attributes:
        stage: when the sum is judged.
        terms: what is added up, in this order.
        thresholds: per format; a format that is missing is one that not all cards list.
        segments, by_length, skip_first: as of a check; a sum has none of its own.
    """

    stage: Stage
    terms: tuple[Term, ...]
    thresholds: Mapping[Format, float]
    segments: tuple[Role, ...] | None = None
    by_length: Mapping[Format, LengthLimits] = field(default_factory=lambda: MappingProxyType({}))
    skip_first: int = 0

    @property
    def detector(self) -> str:
        """What it is called where a check is called by its detector: the sum, written out."""
        parts = (f"{term.weight:g}*{term.name}" for term in self.terms)
        return "+".join(parts).replace("+-", "-")

    @property
    def statistic(self) -> str:
        """What is judged, in words."""
        return "sum" if self.terms[0].scaling is None else "sum of probabilities"

    def key(self) -> tuple[object, ...]:
        """What makes two sums the same."""
        terms = tuple(
            (term.check, term.weight, tuple(sorted(term.scaling.items())) if term.scaling is not None else None)
            for term in self.terms
        )
        return (self.stage, terms, tuple(sorted(self.thresholds.items())))


class Sums:
    """Weighted sums that are computed together: all of statistics, or all of probabilities.

    Args:
        checks: K of them.
        columns: of each sum, where the statistics of its terms stand.
    """

    def __init__(self, checks: Sequence[WeighedCheck], columns: Sequence[Sequence[int]]) -> None:
        shape = (max(len(check.terms) for check in checks), len(checks))
        self._sources = np.zeros(shape, dtype=np.intp)
        self._weights = np.zeros(shape)
        # In a format without scaling a sum has no threshold, and is never judged: what stands there does not matter.
        slopes, intercepts = np.zeros((2, len(FORMATS), *shape))
        for number, (check, places) in enumerate(zip(checks, columns, strict=True)):
            # Shorter sums are filled up with their first term, which counts for nothing there.
            self._sources[:, number] = places[0]
            for place, (term, column) in enumerate(zip(check.terms, places, strict=True)):
                self._sources[place, number] = column
                self._weights[place, number] = term.weight
                for fmt, logistic in (term.scaling or {}).items():
                    slopes[FORMATS.index(fmt), place, number] = logistic.slope
                    intercepts[FORMATS.index(fmt), place, number] = logistic.intercept
        self._scaling = (slopes, intercepts) if checks[0].terms[0].scaling is not None else None

    def values(self, statistics: Float64, formats: npt.NDArray[np.intp]) -> Float64:
        """The sums of R requests.

        Args:
            statistics: (R, columns); not finite while undefined.
            formats: (R,) numbers of the requests' formats.
        Returns: (R, K), -inf where a term is undefined.
        """
        total = np.zeros((len(statistics), self._sources.shape[1]))
        with np.errstate(invalid="ignore"):
            # Term by term: so a sum does not depend, in its last bit, on how many others are summed with it.
            for place, (sources, weights) in enumerate(zip(self._sources, self._weights, strict=True)):
                found = statistics.take(sources, axis=1)
                if self._scaling is not None:
                    slopes, intercepts = (part[formats, place] for part in self._scaling)
                    logits = slopes * np.where(np.isfinite(found), found, np.nan) + intercepts
                    # Half a hyperbolic tangent is the logistic function, and overflows nowhere.
                    found = 0.5 + 0.5 * np.tanh(logits / 2.0)
                total += weights * found
        return np.where(np.isfinite(total), total, -np.inf)
