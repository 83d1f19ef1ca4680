"""What Prometheus is told of sinks."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from monitor import catalogue
from monitor.sinks.delivery import Failure


class SinkMetrics:
    """The metrics of one process's sinks; implements ``monitor.sinks.dispatcher.Observer``.

    Args:
        registry: where they are registered.
        sinks: their names.
    """

    def __init__(self, registry: CollectorRegistry, sinks: Iterable[str]) -> None:
        self._delivered = _counter(catalogue.SINK_DELIVERED, registry)
        self._failed = _counter(catalogue.SINK_FAILED, registry)
        self._dropped = _counter(catalogue.SINK_DROPPED, registry)
        self._dead = _counter(catalogue.SINK_DEAD_LETTERS, registry)
        queue, seconds = catalogue.SINK_QUEUE, catalogue.SINK_SECONDS
        self._queue = Gauge(queue.name, queue.help, queue.labels, registry=registry, multiprocess_mode="livesum")
        self._seconds = Histogram(
            seconds.name, seconds.help, seconds.labels, buckets=seconds.buckets, registry=registry
        )
        # A series that starts at zero makes the first failure a visible increase.
        for sink in sinks:
            for counter in (self._delivered, self._dropped, self._dead):
                counter.labels(sink)
            for failure in Failure:
                self._failed.labels(sink, failure.value)
            self._queue.labels(sink)

    def delivered(self, sink: str, seconds: float) -> None:
        """See ``Observer``."""
        self._delivered.labels(sink).inc()
        self._seconds.labels(sink).observe(seconds)

    def failed(self, sink: str, failure: Failure) -> None:
        """See ``Observer``."""
        self._failed.labels(sink, failure.value).inc()

    def dropped(self, sink: str) -> None:
        """See ``Observer``."""
        self._dropped.labels(sink).inc()

    def dead(self, sink: str) -> None:
        """See ``Observer``."""
        self._dead.labels(sink).inc()

    def waiting(self, sink: str, count: int) -> None:
        """See ``Observer``."""
        self._queue.labels(sink).set(count)


def _counter(metric: catalogue.Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.help, metric.labels, registry=registry)
