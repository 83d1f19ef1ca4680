"""What Prometheus is told of the audit trail."""

from __future__ import annotations

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from monitor import catalogue
from monitor.events import Event


class AuditMetrics:
    """The metrics of one process's writer; implements ``monitor.audit.writer.Observer``.

    Args:
        registry: where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._events = _counter(catalogue.AUDIT_EVENTS, registry)
        seconds, queue = catalogue.AUDIT_SECONDS, catalogue.AUDIT_QUEUE
        self._seconds = Histogram(seconds.name, seconds.help, buckets=seconds.buckets, registry=registry)
        self._queue = Gauge(queue.name, queue.help, registry=registry, multiprocess_mode="livesum")
        self._dropped = _counter(catalogue.AUDIT_DROPPED, registry)
        self._errors = _counter(catalogue.AUDIT_ERRORS, registry)
        self._withheld = _counter(catalogue.AUDIT_WITHHELD, registry)
        for event in get_args(Event):
            self._events.labels(event.model_fields["kind"].default)

    def stored(self, kind: str, seconds: float) -> None:
        """See ``Observer``."""
        self._events.labels(kind).inc()
        self._seconds.observe(seconds)

    def waiting(self, count: int) -> None:
        """See ``Observer``."""
        self._queue.set(count)

    def dropped(self, count: int) -> None:
        """See ``Observer``."""
        self._dropped.inc(count)

    def failed(self) -> None:
        """See ``Observer``."""
        self._errors.inc()

    def withheld(self) -> None:
        """Somebody got an error in the place of what the audit trail could not vouch for."""
        self._withheld.inc()


def _counter(metric: catalogue.Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.help, metric.labels, registry=registry)
