"""A weighted sum of statistics, and when it fires. Plain data and arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
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

    def value(self, statistics: Float64, formats: npt.NDArray[np.intp]) -> Float64:
        """The sum for R requests.

        Args:
            statistics: (R, terms), in the order of the terms; not finite while undefined.
            formats: (R,) numbers of the requests' formats.
        Returns: (R,), -inf where a term is undefined.
        """
        total = np.zeros(len(statistics))
        # Term by term: so a request's sum does not depend, in its last bit, on how many others are summed with it.
        for place, term in enumerate(self.terms):
            column = np.where(np.isfinite(statistics[:, place]), statistics[:, place], 0.0)
            total += term.weight * (column if term.scaling is None else self._scaled(term.scaling, column, formats))
        return np.where(np.isfinite(statistics).all(axis=1), total, -np.inf)

    def _scaled(self, scaling: Mapping[Format, Logistic], column: Float64, formats: npt.NDArray[np.intp]) -> Float64:
        # In a format without scaling the sum has no threshold: whatever stands there is never judged.
        known = [scaling.get(fmt, Logistic(0.0, 0.0)) for fmt in FORMATS]
        slopes = np.array([item.slope for item in known])[formats]
        intercepts = np.array([item.intercept for item in known])[formats]
        # Half a hyperbolic tangent is the same function, and overflows nowhere.
        return np.asarray(0.5 + 0.5 * np.tanh((slopes * column + intercepts) / 2.0))

    def key(self) -> tuple[object, ...]:
        """What makes two sums the same."""
        terms = tuple(
            (term.check, term.weight, tuple(sorted(term.scaling.items())) if term.scaling is not None else None)
            for term in self.terms
        )
        return (self.stage, terms, tuple(sorted(self.thresholds.items())))
