"""What came of a rule that is carried out behind the engine. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from monitor.types import Action


class Outcome(StrEnum):
    """What became of a withheld reply."""

    REFUSED = "refused"
    """It was blocked, or no reply was good: the refusal was sent."""
    SECOND = "second"
    """The second reply was released."""
    FIRST = "first"
    """The first reply was released: the second one was worse."""
    ROUTED = "routed"
    """Another server's reply was passed on; nothing here has read it."""
    CLEAN = "clean"
    """The second opinion was in favour: the reply was released."""
    FLAGGED = "flagged"
    """The second opinion was against: the refusal was sent."""
    FAILED_FLAGGED = "failed_flagged"
    """There was no second opinion, and the reply was released with a flag."""
    FAILED_RELEASED = "failed_released"
    """There was no second opinion, and the policy releases then."""
    FAILED_REFUSED = "failed_refused"
    """What was to be done could not be done, and the refusal was sent."""
    LEFT = "left"
    """The client left before that."""


@dataclass(frozen=True, slots=True)
class HandledRule:
    """A rule that was carried out behind the engine.

    Attributes:
        policy: that it belongs to.
        name: of the rule.
        action: of the rule.
        request_id: the engine's, of the attempt on which it fired.
    """

    policy: str
    name: str
    action: Action
    request_id: str
