"""What Prometheus is told of sessions."""

from __future__ import annotations

from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge

from monitor import catalogue
from monitor.policy import Plan


class Operation(StrEnum):
    """What is asked of a store."""

    READ = "read"
    UPDATE = "update"


class SessionMetrics:
    """The metrics of one process's sessions.

    Args:
        registry: where the metrics are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._fired = _counter(catalogue.SESSION_RULES_FIRED, registry)
        self._requests = _counter(catalogue.SESSION_REQUESTS, registry)
        self._errors = _counter(catalogue.SESSION_STORE_ERRORS, registry)
        self._forgotten = _counter(catalogue.SESSIONS_FORGOTTEN, registry)
        held = catalogue.SESSIONS
        self._sessions = Gauge(held.name, held.help, registry=registry, multiprocess_mode="livesum")
        for operation in Operation:
            self._errors.labels(operation.value)
        for named in ("yes", "no"):
            self._requests.labels(named)

    def begin(self, plan: Plan) -> None:
        """Its rules are label values from now on."""
        for policy in plan.policies:
            for rule in policy.conversations:
                self._fired.labels(rule.name, rule.action.value, rule.mode.value, policy.name)

    def fired(self, rule: str, action: str, mode: str, policy: str) -> None:
        """A rule has fired on a session."""
        self._fired.labels(rule, action, mode, policy).inc()

    def request(self, *, named: bool) -> None:
        """A request has come under a policy with rules over conversations."""
        self._requests.labels("yes" if named else "no").inc()

    def failed(self, operation: Operation) -> None:
        """The store could not be reached."""
        self._errors.labels(operation.value).inc()

    def forgotten(self, count: int) -> None:
        """Sessions were forgotten for want of room."""
        self._forgotten.inc(count)

    def remembered(self, count: int) -> None:
        """So many sessions are in memory."""
        self._sessions.set(count)


def _counter(metric: catalogue.Metric, registry: CollectorRegistry) -> Counter:
    return Counter(metric.name, metric.help, metric.labels, registry=registry)
