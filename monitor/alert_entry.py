"""``alert`` in a policy file: of how many flagged requests somebody has to know. Data, checked for itself."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from monitor.prometheus_rule import Severity
from monitor.strict import Name, Strict

Rate = Annotated[
    str,
    Field(
        pattern=r"^[1-9][0-9]{0,6}/(m|h|d)$",
        description="requests in a minute, an hour or a day that are still no reason to tell anybody: 5/h",
    ),
]
Span = Annotated[
    str, Field(pattern=r"^(0|[1-9][0-9]{0,4})(s|m|h|d)$", description="a whole number with its unit: 30s, 10m, 1h, 7d")
]


class AlertEntry(Strict):
    """Whom flagged requests wake, and how many it takes: more than a rate, or at least a count.

    A request counts once, and in shadow too: an alert tells, it does not act.
    """

    severity: Literal[Severity.CRITICAL, Severity.WARNING, Severity.INFO] = Field(
        description="critical, warning or info: a label that Alertmanager routes by"
    )
    rate: Rate | None = Field(default=None, description="it alerts above so many requests in one such time: 5/h")
    count: int | None = Field(
        default=None, ge=1, le=1_000_000, description="in the place of 'rate': it alerts from so many requests on"
    )
    within: Span | None = Field(default=None, description="with 'count': the time in which they are counted: 10m")
    hold: Span = Field(default="0s", alias="for", description="how long that has to last before it alerts: 5m")
    notify: Name | None = Field(default=None, description="a sink of this file that is told too, by its name")

    @model_validator(mode="after")
    def _rate_or_count(self) -> Self:
        if (self.rate is None) == (self.count is None):
            raise ValueError("an alert has exactly one of 'rate', e.g. 5/h, and 'count', e.g. count: 3, within: 10m")
        if (self.count is None) != (self.within is None):
            raise ValueError("'count' and 'within' stand together: {count: 3, within: 10m}. A rate has its own time")
        if self.within is not None and self.within.startswith("0"):
            raise ValueError(f"'within' is {self.within}; it must be longer than nothing")
        return self

    @property
    def window(self) -> str:
        """The time in which requests are counted, as PromQL writes it."""
        return self.within or f"1{(self.rate or '').rpartition('/')[2]}"

    @property
    def condition(self) -> str:
        """What the number of requests is compared with, as PromQL writes it."""
        return f">= {self.count}" if self.rate is None else f"> {self.rate.partition('/')[0]}"

    def in_words(self) -> str:
        """The condition, for people."""
        limit = f"from {self.count} requests within {self.within} on" if self.rate is None else f"above {self.rate}"
        held = "" if self.hold.startswith("0") else f", for {self.hold}"
        told = "" if self.notify is None else f"; tells {self.notify}"
        return f"{self.severity.value} alert {limit}{held}{told}"
