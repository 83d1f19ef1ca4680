"""One live request, as the monitor knows it. Decides nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from monitor.attempt import Attempt
from monitor.dose import Dose
from monitor.segments import Codes
from monitor.types import Action, ActionCode, Gap, PromptEvent
from probes.card import Format

Float64 = npt.NDArray[np.float64]
Index = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Decision:
    """What is decided about a request.

    Attributes:
        action: the most severe one.
        rule: what decided it, or ``on_gap`` / ``on_uncalibrated``; empty while the action is allow.
        text: what a blocked reply says.
    """

    action: ActionCode
    rule: str
    text: str


@dataclass(slots=True, eq=False)
class Choices:
    """The choices that one request asked for, where a block of one may be a block of all.

    Attributes:
        name: of the request.
        live: those that have not ended.
        blocked: rule and text of the block of all; None until then.
    """

    name: str
    live: list[Request] = field(default_factory=list)
    blocked: tuple[str, str] | None = None

    def join(self, request: Request) -> None:
        """One more choice."""
        request.choices = self
        self.live.append(request)
        if self.blocked is not None:
            request.raise_to(Action.BLOCK, *self.blocked)

    def block(self, rule: str, text: str) -> None:
        """Block all."""
        self.blocked = self.blocked or (rule, text)
        for request in self.live:
            request.raise_to(Action.BLOCK, *self.blocked)


@dataclass(slots=True, eq=False)
class Request:
    """One live request.

    Attributes:
        request_id: vLLM's internal id.
        slot: its row in the arrays.
        num_prompt: prompt tokens.
        policy: position of its policy in the plan.
        fmt: how its text reached the model.
        stream_from: position from which stream checks read.
        roles: (num_prompt,) role codes of the prompt; None if every check reads everything.
        events: what was noticed while its prompt was made.
        gaps: positions that should have been scored and were not, by reason.
        action: the most severe action so far.
        rule: what decided it; empty while the action is allow.
        text: what a blocked reply says.
        decided: rules (and reserved rule names) that have acted; each counts once.
        outside: rules that are enforced for others, and run in shadow for this request.
        fired_at: by a check's position in the plan, the newest token position when it fired.
        steers: positions of the steers that rules have switched on; those behind gates are the engine's to find.
        doses: what steers did to it, by their positions.
        tenant: who sent it; empty where nobody who may say so does.
        attempt: which attempt at an answer it is.
        counted: whether it is a user's; else our own, made to say in the route's words what is decided already.
        ends: whether further tokens are of no use.
        choices: it and the others that were asked for with it; None where they have nothing to do with each other.
        plan: digest of the plan that it is under.
    """

    request_id: str
    slot: int
    num_prompt: int
    policy: int
    fmt: Format
    stream_from: int
    roles: Codes | None = None
    events: tuple[PromptEvent, ...] = ()
    gaps: Counter[Gap] = field(default_factory=Counter)
    action: ActionCode = ActionCode.ALLOW
    rule: str = ""
    text: str = ""
    decided: set[str] = field(default_factory=set)
    outside: frozenset[str] = frozenset()
    fired_at: dict[int, int] = field(default_factory=dict)
    steers: set[int] = field(default_factory=set)
    doses: dict[int, Dose] = field(default_factory=dict)
    tenant: str = ""
    attempt: Attempt = Attempt.UNHELD
    counted: bool = True
    ends: bool = False
    choices: Choices | None = None
    plan: str = ""

    def raise_to(self, action: Action, rule: str, text: str, *, ends: bool = False) -> None:
        """Take over an action if it is more severe than the present one.

        Args:
            action: a block ends the request.
            rule: that decided it.
            text: what a blocked reply says.
            ends: whether further tokens are of no use for another reason.
        """
        code = ActionCode(action.severity)
        if code > self.action:
            self.action, self.rule, self.text = code, rule, text
            self.ends = ends or action is Action.BLOCK


def is_blocked(request: Request | None) -> bool:
    """Whether a request is to be stopped: it is blocked, or its reply will be of no use."""
    return request is not None and request.ends
