"""A check: one statistic of a request, and when it fires. Plain data."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self

from monitor.types import Role
from probes.aggregate import Aggregator
from probes.card import Format, Stage


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """Thresholds by the length of what is read.

    Attributes:
        ends: longest lengths in tokens, ascending, of all but the last.
        values: one threshold for each, and the last one for whatever is longer.
    """

    ends: tuple[int, ...]
    values: tuple[float, ...]

    def at(self, length: int) -> float:
        """The threshold for a read sequence of so many tokens."""
        return self.values[bisect_left(self.ends, length)]

    def longest(self, length: int) -> int | None:
        """The longest length whose threshold is that of ``length``; None if whatever is longer has it."""
        place = bisect_left(self.ends, length)
        return self.ends[place] if place < len(self.ends) else None


Limits = Mapping[Format, float | LengthLimits]
"""Above which a statistic fires, per format: at any length, or by length."""


@dataclass(frozen=True, slots=True)
class Check:
    """One statistic and when it fires.

    Attributes:
        detector: name of the detector whose scores are aggregated.
        stage: when the statistic is judged.
        aggregate: how scores become the statistic.
        skip_first: leading positions that are not read (the card's sink).
        thresholds: per format; a format that is missing is not calibrated. Where they depend on the length, the lowest.
        segments: the roles that are read, in the order of ``Role``; None reads everything. Only of a prompt: a reply is
            one segment.
        by_length: per format, thresholds by length, where there are any.
    """

    detector: str
    stage: Stage
    aggregate: Aggregator
    skip_first: int
    thresholds: Mapping[Format, float]
    segments: tuple[Role, ...] | None = None
    by_length: Mapping[Format, LengthLimits] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        detector: str,
        stage: Stage,
        aggregate: Aggregator,
        *,
        skip_first: int,
        limits: Limits,
        segments: tuple[Role, ...] | None = None,
    ) -> Self:
        """A check whose thresholds are the same at any length in some formats, and go by length in others."""
        by_length = {fmt: limit for fmt, limit in limits.items() if isinstance(limit, LengthLimits)}
        thresholds = {
            fmt: min(limit.values) if isinstance(limit, LengthLimits) else limit for fmt, limit in limits.items()
        }
        return cls(
            detector, stage, aggregate, skip_first, MappingProxyType(thresholds), segments, MappingProxyType(by_length)
        )

    @property
    def statistic(self) -> str:
        """What is judged, in words."""
        return str(self.aggregate)

    def key(self) -> tuple[object, ...]:
        """What makes two checks the same."""
        thresholds = tuple(sorted(self.thresholds.items()))
        by_length = tuple((fmt, self.by_length[fmt]) for fmt in sorted(self.by_length))
        return (self.detector, self.stage, self.aggregate, self.skip_first, thresholds, self.segments, by_length)
