"""Tells of tenants that probe a threshold: counts them and enters an event. Stops nobody."""

from __future__ import annotations

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
        plan: what runs.
        registry: for metrics.
        ledger: where events are entered; None if they are not.
    """

    def __init__(self, plan: Plan, registry: CollectorRegistry, ledger: Ledger | None = None) -> None:
        self._plan = plan
        self._ledger = ledger
        self._probing = Probing(plan)
        metric = catalogue.PROBING
        self._found = Counter(metric.name, metric.help, metric.labels, registry=registry)
        for number, policy in enumerate(plan.policies):
            for fmt in Format:
                for band in self._probing.bands(number, fmt):
                    self._found.labels(plan.checks[band.check].detector, policy.name)

    def see(self, sitting: Sitting, reading: Reading) -> None:
        """A request has ended."""
        policy = self._plan.policies[reading.policy]
        for found in self._probing.see(sitting.tenant, reading.policy, reading.fmt, reading.statistics):
            check = self._plan.checks[found.band.check]
            self._found.labels(check.detector, policy.name).inc()
            if self._ledger is None:
                continue
            event = ProbingSuspected(
                plan=self._plan.digest,
                policy=policy.name,
                detector=check.detector,
                stage=check.stage,
                requests=found.requests,
                near=found.near,
                benign=found.band.benign,
            )
            ticket = self._ledger.noticed(event, reading.request_id, sitting.tenant or None)
            if ticket is not None:
                sitting.tickets.append(ticket)
