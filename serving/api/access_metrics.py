"""What Prometheus is told of those who got no answer."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from monitor import catalogue
from serving.api.refusal import Reason


class AccessMetrics:
    """The metrics of one process's gate.

    Args:
        registry: where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        metric = catalogue.TURNED_AWAY
        self._turned_away = Counter(metric.name, metric.help, metric.labels, registry=registry)
        # A series that starts at zero makes the first one a visible increase.
        for reason in Reason:
            self._turned_away.labels(reason.value)

    def turned_away(self, reason: Reason) -> None:
        """Somebody got an error in the place of an answer."""
        self._turned_away.labels(reason.value).inc()
