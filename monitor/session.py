"""A session: what is remembered of the requests of one conversation, and what stands against it. Plain arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from monitor.accumulate import Accumulator, State
from monitor.rollout import Subject
from probes.card import Format


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a rule watches over the requests of a session, made ready.

    Attributes:
        key: tells it from every other one, and from itself with other parameters or another detector.
        check: position in the plan of the statistic that is taken of each request.
        accumulator: what they become.
        threshold: it fires above it, strictly.
        by: whose requests belong together: a session's or a tenant's.
        lasts: seconds for which it stands once it has fired; infinite: until the session ends.
        holds: whether a session against which it stands must not be forgotten: it would be free of a steer or a block.
        formats: in which the statistic means something.
    """

    key: str
    check: int
    accumulator: Accumulator
    threshold: float
    by: Subject
    lasts: float
    holds: bool
    formats: frozenset[Format]


@dataclass(frozen=True, slots=True)
class Fired:
    """A rule has fired on a session.

    Attributes:
        key: of the rule's conversation.
        value: of its accumulator.
        requests: of the session, the one included that made it fire.
        until: it stands; Unix seconds, infinite until the session ends.
    """

    key: str
    value: float
    requests: int
    until: float


@dataclass(frozen=True, slots=True)
class Session:
    """What is remembered of a conversation. Times are Unix seconds.

    Attributes:
        seen: when its newest request ended.
        requests: that have ended.
        states: of accumulators, by the keys of conversations.
        stands: until when which rules stand, likewise.
        held: until when it must not be forgotten for others' sake; infinite until it ends.
    """

    seen: float
    requests: int = 0
    states: Mapping[str, State] = field(default_factory=dict)
    stands: Mapping[str, float] = field(default_factory=dict)
    held: float = -math.inf

    def ends(self, idle: float) -> float:
        """When it is over: so many seconds after its last request, but not while something stands for a time."""
        finite = [until for until in self.stands.values() if math.isfinite(until)]
        return max(self.seen + idle, *finite) if finite else self.seen + idle

    def stand(self, key: str, now: float) -> bool:
        """Whether a rule stands against it."""
        return self.stands.get(key, -math.inf) > now

    def to_json(self) -> str:
        """As text, for a store."""
        return json.dumps([self.seen, self.requests, self.states, self.stands, self.held], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Undo ``to_json``.

        Raises:
            ValueError: it is no session.
        """
        try:
            seen, requests, states, stands, held = json.loads(text)
            remembered = {key: tuple(map(float, state)) for key, state in states.items()}
            return cls(seen, requests, remembered, dict(stands), held)
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"no session: {error}") from error


def advance(
    session: Session | None, readings: Sequence[tuple[Conversation, float]], now: float
) -> tuple[Session, tuple[Fired, ...]]:
    """A request of a session has ended.

    Args:
        session: before it; None if there was none.
        readings: of each conversation the request's statistic; one that is not finite was never defined, and is no
            part of the sequence.
        now: Unix seconds.
    Returns: the session after it, and what has fired. What stands already does not fire again.
    """
    before = session if session is not None else Session(now)
    states, held = dict(before.states), before.held
    stands = {key: until for key, until in before.stands.items() if until > now}
    fired = []
    for conversation, statistic in readings:
        if not math.isfinite(statistic):
            continue
        key, accumulator = conversation.key, conversation.accumulator
        step = accumulator.step(states.get(key) or accumulator.start(), statistic, now)
        states[key] = step.state
        if step.value > conversation.threshold and key not in stands:
            stands[key] = until = now + conversation.lasts
            held = max(held, until) if conversation.holds else held
            fired.append(Fired(key, step.value, before.requests + 1, until))
    return Session(max(now, before.seen), before.requests + 1, states, stands, held), tuple(fired)
