"""What came up in a conversation and is forgotten by half: a decayed sum, or a decayed maximum."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from monitor.accumulate.base import Accumulator, State, Step
from monitor.duration import Duration, seconds_of


class Joint(StrEnum):
    """What is made of the old value and the new one."""

    SUM = "sum"
    MAXIMUM = "maximum"


class HalfLife(BaseModel):
    """After which a value counts half: so many requests, or so much time."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    requests: float | None = Field(default=None, gt=0, le=1e6, allow_inf_nan=False, description="so many requests")
    time: Duration | None = Field(default=None, description="so much time, e.g. 10m")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.requests is None) == (self.time is None):
            raise ValueError("a half-life has exactly one of 'requests' and 'time'")
        if self.time is not None and seconds_of(self.time) == 0:
            raise ValueError("a half-life of no time would remember nothing; say how long, e.g. time: 10m")
        return self

    def kept(self, seconds: float) -> float:
        """The share that is left at the next request, after so many seconds: 0 to 1."""
        halves = 1 / self.requests if self.requests is not None else seconds / seconds_of(self.time or "1s")
        return math.exp2(-halves)


class Decay(Accumulator):
    """``A_t = join(k A_{t-1}, x_t)`` with ``x_t = max(0, statistic_t - baseline)``; ``k`` halves per half-life.

    What lies below ``baseline`` adds nothing: however much harmless talk comes between, it only gives time to forget.
    """

    kind = "decay"

    # Their schemas stand in line: the kinds of a field share no definitions.
    half_life: Annotated[HalfLife, WithJsonSchema(HalfLife.model_json_schema())] = Field(
        description="after which a value counts half: {requests: 4} or {time: 10m}"
    )
    join: Annotated[Joint, Field(strict=False), WithJsonSchema({"enum": list(Joint), "type": "string"})] = Field(
        default=Joint.SUM, description="of the old value and the new one: sum or maximum"
    )
    baseline: Annotated[
        float, Field(allow_inf_nan=False, description="what lies above it counts, and what lies below adds nothing")
    ] = 0.0

    def start(self) -> State:
        """See ``Accumulator.start``: the value, and when the request before ended, NaN before the first."""
        return (0.0, math.nan)

    def step(self, state: State, statistic: float, now: float) -> Step:
        """See ``Accumulator.step``."""
        value, before = state
        if not math.isnan(before):
            now = max(now, before)
            value *= self.half_life.kept(now - before)
        new = max(0.0, statistic - self.baseline)
        value = value + new if self.join is Joint.SUM else max(value, new)
        return Step((value, now), value)

    def __str__(self) -> str:
        after = self.half_life.time or f"{self.half_life.requests:g} requests"
        return f"{self.kind}({self.join.value} above {self.baseline:g}, half after {after})"
