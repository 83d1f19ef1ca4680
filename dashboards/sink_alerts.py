"""The alert on sinks: what was to be told arrived nowhere."""

from __future__ import annotations

from dashboards.window import MINUTE, Clock
from monitor import catalogue
from monitor.prometheus_rule import RUNBOOKS, Alert, Severity

_NAME = "TelltaleSinkLoss"


def sink_alerts(clock: Clock) -> tuple[Alert, ...]:
    """Messages that were given up or dropped."""
    five = clock(5 * MINUTE)
    lost = " or ".join(
        f"sum by (job, instance, sink) (increase({metric.name}[{five}])) > 0"
        for metric in (catalogue.SINK_DEAD_LETTERS, catalogue.SINK_DROPPED)
    )
    return (
        Alert(
            _NAME,
            lost,
            clock(0),
            Severity.WARNING,
            "messages for {{ $labels.sink }} were not delivered",
            "Its receiver refused them, or did not answer for as long as it was tried, or more came than it takes.",
            runbook=f"{RUNBOOKS}/{_NAME}.md",
        ),
    )
