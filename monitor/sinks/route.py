"""Which events a sink is told of."""

from __future__ import annotations

from monitor.events import Decision, Event
from monitor.sinks.bound import NOTHING, Bound
from monitor.sinks.settings import SinkEntry, SinkEvent
from monitor.types import Mode


class Route:
    """Chooses what one sink is told.

    Args:
        entry: of the policy file.
        bound: what goes there because an alert names the sink.
    """

    def __init__(self, entry: SinkEntry, bound: Bound = NOTHING) -> None:
        self._entry = entry
        self._bound = bound
        self._kinds = frozenset(event.value for event in entry.events)

    def wants(self, event: Event) -> bool:
        """Whether an event goes to the sink."""
        match event:
            case Decision():
                return self._bound.has(event) or (SinkEvent.DECISION in self._entry.events and self._chosen(event))
            case _:
                return event.kind in self._kinds

    def _chosen(self, event: Decision) -> bool:
        entry = self._entry
        fired = [rule for rule in event.rules if entry.shadow or rule.mode is Mode.ENFORCE]
        severity = max((rule.action.severity for rule in fired), default=0)
        if max(event.action.severity, severity) < entry.min_action.severity:
            return False
        if entry.rules is not None and not any(rule.name in entry.rules for rule in fired):
            return False
        return entry.detectors is None or any(
            verdict.fired and verdict.detector in entry.detectors for verdict in event.verdicts
        )
