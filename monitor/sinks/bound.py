"""Which events go to a sink because an alert names it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from monitor.events import Decision
from monitor.flag_alert import FlagAlert, Watched


@dataclass(frozen=True, slots=True)
class Bound:
    """What sends its events to a sink by naming it, whatever else the sink chooses.

    Attributes:
        rules: by policy and name, as they stand in the policy file.
        detectors: by name.
    """

    rules: frozenset[tuple[str, str]] = frozenset()
    detectors: frozenset[str] = frozenset()

    def has(self, event: Decision) -> bool:
        """Whether one of them fired, in shadow too: an alert tells, it does not act."""
        # The plan calls a policy with a tenant's thresholds POLICY@TENANT.
        policy = event.policy.partition("@")[0]
        return any((policy, rule.name) in self.rules for rule in event.rules) or any(
            verdict.fired and verdict.detector in self.detectors for verdict in event.verdicts
        )


NOTHING = Bound()


def bound_by(alerts: Iterable[FlagAlert]) -> Mapping[str, Bound]:
    """By a sink's name, what the alerts of a plan bind to it."""
    found: dict[str, Bound] = {}
    for alert in alerts:
        sink = alert.entry.notify
        if sink is None:
            continue
        rules, detectors = frozenset[tuple[str, str]](), frozenset[str]()
        if alert.watched is Watched.RULE:
            rules = frozenset((alert.policy, name) for name in alert.names)
        else:
            detectors = frozenset(alert.names)
        known = found.get(sink, NOTHING)
        found[sink] = Bound(known.rules | rules, known.detectors | detectors)
    return found
