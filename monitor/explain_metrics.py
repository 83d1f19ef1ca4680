"""What Prometheus is told of explanations."""

from __future__ import annotations

from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge

from monitor import catalogue


class Outcome(StrEnum):
    """What became of a flagged request."""

    EXPLAINED = "explained"
    """It is in the audit trail."""
    DROPPED = "dropped"
    """The queue was full, and others came after it."""
    FAILED = "failed"
    """It could not be read again."""


class ExplainMetrics:
    """The metrics of one API process.

    Args:
        registry: where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        outcomes, waiting = catalogue.EXPLANATIONS, catalogue.EXPLANATIONS_WAITING
        self._outcomes = Counter(outcomes.name, outcomes.help, outcomes.labels, registry=registry)
        self._waiting = Gauge(waiting.name, waiting.help, registry=registry, multiprocess_mode="livesum")
        for outcome in Outcome:
            self._outcomes.labels(outcome.value)

    def count(self, outcome: Outcome) -> None:
        """One more came to this."""
        self._outcomes.labels(outcome.value).inc()

    def waiting(self, count: int) -> None:
        """So many wait."""
        self._waiting.set(count)
