"""Tells of tenants that probe a threshold: counts them and enters an event. Stops nobody."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter

from monitor import catalogue
from monitor.events import ProbingSuspected
from monitor.policy import Plan
from monitor.probing import Probing
from probes.card import Format
from serving.engine.ledger import Ledger
from serving.sitting import Reading, Sitting


class ProbingWatch:
    """What one API process sees of it; several processes each see their own part of a tenant's requests.

    Args:
        plan: gives what runs. With another one, all are watched anew.
        registry: for metrics.
        ledger: gives where events are entered; None if they are not.
    """

    def __init__(
        self, plan: Callable[[], Plan], registry: CollectorRegistry, ledger: Callable[[], Ledger | None] = lambda: None
    ) -> None:
        self._plan = plan
        self._ledger = ledger
        metric = catalogue.PROBING
        self._found = Counter(metric.name, metric.help, metric.labels, registry=registry)
        self._begin(plan())

    def _begin(self, plan: Plan) -> None:
        self._digest, self._probing = plan.digest, Probing(plan)
        for number, policy in enumerate(plan.policies):
            for fmt in Format:
                for band in self._probing.bands(number, fmt):
                    self._found.labels(plan.checks[band.check].detector, policy.name)

    def see(self, sitting: Sitting, reading: Reading) -> None:
        """A request has ended."""
        plan = self._plan()
        if plan.digest != self._digest:
            self._begin(plan)
        if reading.plan.digest != self._digest:
            return  # the last requests under an older plan
        policy = plan.policies[reading.policy]
        for found in self._probing.see(sitting.tenant, reading.policy, reading.fmt, reading.statistics):
            check = plan.checks[found.band.check]
            self._found.labels(check.detector, policy.name).inc()
            ledger = self._ledger()
            if ledger is None:
                continue
            event = ProbingSuspected(
                plan=plan.digest,
                policy=policy.name,
                detector=check.detector,
                stage=check.stage,
                requests=found.requests,
                near=found.near,
                benign=found.band.benign,
            )
            ticket = ledger.noticed(event, reading.request_id, sitting.tenant or None)
            if ticket is not None:
                sitting.tickets.append(ticket)
