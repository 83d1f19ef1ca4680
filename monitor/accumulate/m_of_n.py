"""The m-th largest of the newest n requests: above a threshold exactly when at least m of the newest n are."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from monitor.accumulate.of_aggregate import OfAggregate
from probes.aggregate.base import Aggregator
from probes.aggregate.m_of_n import MOfN as MOfNScores


class MOfN(OfAggregate):
    """Requests that must repeat: ``count`` of the newest ``window`` lie above the rule's threshold."""

    kind = "m_of_n"

    count: Annotated[int, Field(ge=1, le=256, description="m: requests that must be high")] = 3
    window: Annotated[int, Field(ge=1, le=256, description="n: newest requests that are looked at")] = 8

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.count > self.window:
            raise ValueError(f"count is {self.count}, window {self.window}: count must not be larger")
        return self

    @property
    def aggregate(self) -> Aggregator:
        """See ``OfAggregate``."""
        return MOfNScores(count=self.count, window=self.window)
