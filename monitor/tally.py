"""What happened since the last report, counted for metrics. Plain numbers; decides nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from monitor.types import Action, Gap, Mode, PromptEvent, Skip


@dataclass(slots=True)
class Tally:
    """What happened since the last report, for metrics.

    Attributes:
        scored: positions.
        skipped: positions by reason.
        gaps: positions by reason.
        acted: how often (rule, action, mode, policy) acted or, in shadow, would have.
        events: requests with something noteworthy in their prompt.
        unsigned: requests that came without our front end's data.
        steered: rows that steers changed, by the steer's name.
        policy_seconds: that rules took to be judged.
    """

    scored: int = 0
    skipped: Counter[Skip] = field(default_factory=Counter)
    gaps: Counter[Gap] = field(default_factory=Counter)
    acted: Counter[tuple[str, Action, Mode, str]] = field(default_factory=Counter)
    events: Counter[PromptEvent] = field(default_factory=Counter)
    unsigned: int = 0
    steered: Counter[str] = field(default_factory=Counter)
    policy_seconds: float = 0.0

    def add(self, other: Tally) -> None:
        """Add what another one has counted."""
        self.scored += other.scored
        self.unsigned += other.unsigned
        self.policy_seconds += other.policy_seconds
        self.skipped.update(other.skipped)
        self.gaps.update(other.gaps)
        self.acted.update(other.acted)
        self.events.update(other.events)
        self.steered.update(other.steered)
