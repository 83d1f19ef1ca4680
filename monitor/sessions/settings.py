"""The ``sessions`` section of the policy file. Plain data: the scheduler reads it too, and knows no database."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from monitor.duration import Duration, seconds_of
from monitor.strict import Strict
from monitor.types import Action

_SERVER_SCHEMES = ("postgresql://", "postgresql+psycopg://")


class SessionSettings(Strict):
    """Where conversations are remembered, how many of them and for how long."""

    url: str | None = Field(
        default=None,
        description="postgresql://USER@HOST/DATABASE, for several replicas; left out: in the memory of the process",
    )
    on_failure: Literal[Action.ALLOW, Action.FLAG, Action.BLOCK] | None = Field(
        default=None, description="what to do with a request while the database cannot be reached: block, flag or allow"
    )
    idle: Duration = Field(
        default="1h", description="a session ends when its last request was so long ago: 1s to 240h; 'until: end'"
    )
    per_tenant: int = Field(
        default=10_000, ge=1, le=10_000_000, description="sessions of one tenant that are remembered at the same time"
    )
    total: int = Field(default=100_000, ge=1, le=10_000_000, description="sessions of all tenants together, in memory")

    @model_validator(mode="after")
    def _known_store(self) -> Self:
        if self.url is not None and not self.url.startswith(_SERVER_SCHEMES):
            raise ValueError(
                f"'url' begins with {self.url.partition(':')[0]!r}; it must begin with postgresql://. Leave it out to "
                "remember sessions in memory"
            )
        if (self.url is None) != (self.on_failure is None):
            raise ValueError(
                "'url' and 'on_failure' stand together: a database can fail, and then requests are blocked, flagged "
                "or allowed. Memory has no 'on_failure'"
            )
        if not 1 <= self.idle_seconds <= 240 * 3600:
            raise ValueError(f"'idle' is {self.idle}; it must lie between 1s and 240h")
        return self

    @property
    def idle_seconds(self) -> float:
        """``idle`` in seconds."""
        return seconds_of(self.idle)
