"""Which events a sink is told of."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from monitor.events import Decision, Event
from monitor.sinks.settings import SinkEntry, SinkEvent
from monitor.types import Mode


@dataclass(frozen=True, slots=True)
class Bound:
    """What sends its events to a sink by naming it, whatever else the sink chooses.

    Attributes:
        rules, detectors: by name.
    """

    rules: Collection[str] = field(default_factory=frozenset)
    detectors: Collection[str] = field(default_factory=frozenset)


class Route:
    """Chooses what one sink is told.

    Args:
        entry: of the policy file.
        bound: rules and detectors that name the sink.
    """

    def __init__(self, entry: SinkEntry, bound: Bound | None = None) -> None:
        self._entry = entry
        self._bound = bound or Bound()
        self._kinds = frozenset(event.value for event in entry.events)

    def wants(self, event: Event) -> bool:
        """Whether an event goes to the sink."""
        match event:
            case Decision():
                return self._is_bound(event) or (SinkEvent.DECISION in self._entry.events and self._chosen(event))
            case _:
                return event.kind in self._kinds

    def _is_bound(self, event: Decision) -> bool:
        return any(rule.name in self._bound.rules for rule in event.rules) or any(
            verdict.fired and verdict.detector in self._bound.detectors for verdict in event.verdicts
        )

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
