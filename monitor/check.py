"""A check: one statistic of a request, and when it fires. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from monitor.types import Role
from probes.aggregate import Aggregator
from probes.card import Format, Stage


@dataclass(frozen=True, slots=True)
class Check:
    """One statistic and when it fires.

    Attributes:
        detector: name of the detector whose scores are aggregated.
        stage: when the statistic is judged.
        aggregate: how scores become the statistic.
        skip_first: leading positions that are not read (the card's sink).
        thresholds: per format; a format that is missing is not calibrated.
        segments: the roles that are read, in the order of ``Role``; None reads everything. Only of a prompt: a reply is
            one segment.
    """

    detector: str
    stage: Stage
    aggregate: Aggregator
    skip_first: int
    thresholds: Mapping[Format, float]
    segments: tuple[Role, ...] | None = None

    def key(self) -> tuple[object, ...]:
        """What makes two checks the same."""
        thresholds = tuple(sorted(self.thresholds.items()))
        return (self.detector, self.stage, self.aggregate, self.skip_first, thresholds, self.segments)
