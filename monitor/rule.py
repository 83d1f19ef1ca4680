"""A rule of the policy file as data: when, what is done, and whether it is done. Knows no detector and no engine."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from monitor.alert_entry import AlertEntry
from monitor.attempt import DEFERRED
from monitor.destination import Destination
from monitor.duration import Duration, seconds_of
from monitor.rollout import Subject
from monitor.strict import Name, Strict
from monitor.types import RESERVED_RULES, Action, Mode
from monitor.when import (
    Condition,
    When,
    WhenConversation,
    WhenWeighed,
    conversations_in,
    known_by_prompt,
    parts_of,
)
from probes.card import Stage


class Gate(StrEnum):
    """Which of the rows that a steer may write to are written to."""

    TOKEN = "token"  # noqa: S105 - no secret
    """Those that lie above the rule's threshold themselves."""
    LATCHED = "latched"
    """All behind the first one that made the rule fire."""


_REQUIRED = {
    Action.STEER: ("steer",),
    Action.ESCALATE: ("to", "on_failure"),
    Action.ROUTE: ("to",),
}
_BELONGS: dict[str, tuple[frozenset[Action], str]] = {
    "steer": (frozenset({Action.STEER, Action.REGENERATE}), "says how to steer"),
    "gate": (frozenset({Action.STEER}), "says how to steer"),
    "text": (frozenset({Action.BLOCK, *DEFERRED}), "is what a blocked reply says"),
    "scope": (frozenset({Action.BLOCK}), "says which choices a block stops"),
    "system": (frozenset({Action.REGENERATE}), "stands before the conversation when it is answered again"),
    "otherwise": (frozenset({Action.REGENERATE}), "says what becomes of two replies on which the rule fires"),
    "to": (frozenset({Action.ESCALATE, Action.ROUTE}), "says who judges or answers"),
    "on_failure": (frozenset({Action.ESCALATE}), "says what is done without a second opinion"),
    "timeout": (frozenset({Action.ESCALATE, Action.ROUTE}), "is how long somebody else is waited for"),
    "budget": (frozenset({*DEFERRED}), "is how often a minute somebody is asked"),
}
"""Which actions a key belongs to."""


END: Final = "end"
"""A session's: when nothing has been heard of it for ``sessions.idle``."""
Until = Annotated[str, Field(pattern=r"^(end|[0-9]{1,6}(ms|s|m|h))$")]
_IN_CONVERSATIONS = (Action.FLAG, Action.STEER, Action.BLOCK)


class Scope(StrEnum):
    """What a block stops, of a request that asks for several choices."""

    CHOICE = "choice"
    """The choice that made the rule fire."""
    REQUEST = "request"
    """All choices: whoever asks for many gets none, if one of them is blocked."""


class Otherwise(StrEnum):
    """What becomes of two replies of which neither is good."""

    BLOCK = "block"
    """Neither is released; the first one ends as soon as the rule fires."""
    RELEASE = "release"
    """The one with the lower statistic is released."""


class Do(Strict):
    """What a rule does."""

    action: Literal[Action.FLAG, Action.STEER, Action.ESCALATE, Action.ROUTE, Action.REGENERATE, Action.BLOCK]
    steer: Name | None = Field(default=None, description="which steer; one of those under 'steers'")
    gate: Gate | None = Field(
        default=None,
        description="which rows are written to: latched, all behind the one that makes the rule fire; token, those "
        "that lie above the threshold themselves",
    )
    text: str | None = Field(default=None, min_length=1, max_length=4096, description="what a blocked reply says")
    scope: Scope | None = Field(
        default=None,
        description="what a block stops where a request asks for several choices (n > 1): choice, the one that made "
        "the rule fire (the default), or request, all of them",
    )

    system: str | None = Field(
        default=None, min_length=1, max_length=16384, description="system prompt under which the model answers again"
    )
    otherwise: Otherwise | None = Field(
        default=None,
        description="if the rule fires on the second reply too: block (the default), or release, the one of the two "
        "with the lower statistic",
    )
    to: Destination | None = Field(default=None, description="who gives a second opinion, or who answers instead")
    on_failure: Literal[Action.ALLOW, Action.FLAG, Action.BLOCK] | None = Field(
        default=None, description="what to do where there is no second opinion: block, flag or allow"
    )
    timeout: Duration | None = Field(default=None, description="how long to wait for somebody else: 100ms to 5m")
    budget: int | None = Field(
        default=None, ge=1, le=100_000, description="how often a minute, in each API process; more has failed"
    )
    until: Until | None = Field(
        default=None,
        description="how long a rule over a conversation stands against the session's next requests: end, as long as "
        "the session lasts (the default), or a time, 30m",
    )

    @model_validator(mode="after")
    def _keys_of_the_action(self) -> Self:
        for key, (actions, meaning) in _BELONGS.items():
            if getattr(self, key) is not None and self.action not in actions:
                named = ", ".join(action.value for action in Action if action in actions)
                raise ValueError(f"{key!r} {meaning}; it stands with 'action: {named}' alone")
        if missing := [key for key in _REQUIRED.get(self.action, ()) if getattr(self, key) is None]:
            raise ValueError(f"'action: {self.action.value}' also needs {' and '.join(map(repr, missing))}")
        return self

    @model_validator(mode="after")
    def _other_conditions(self) -> Self:
        if self.action is Action.REGENERATE and (self.system is None) == (self.steer is None):
            raise ValueError(
                "'action: regenerate' has exactly one of 'system', a system prompt, and 'steer', the name of a steer: "
                "what is to be different the second time"
            )
        if self.to is not None and self.to.is_opinion != (self.action is Action.ESCALATE):
            raise ValueError(
                "'to' of 'escalate' names a 'probe', a 'judge' or a 'classifier'; that of 'route' a 'model' or an "
                "'upstream'"
            )
        if self.timeout is not None and not 0.1 <= seconds_of(self.timeout) <= 300:  # noqa: PLR2004 - as stated
            raise ValueError(f"'timeout' is {self.timeout}; it must lie between 100ms and 5m")
        return self


class Rollout(Strict):
    """For whom an enforcing rule is enforced; for all others it runs in shadow."""

    percent: float = Field(ge=0, le=100, description="share of the subjects that the rule is enforced for")
    by: Subject = Field(
        default=Subject.TENANT,
        description="who is in or out as a whole: tenant, session or request; by session and by request a client gets "
        "out by trying again",
    )


class Rule(Strict):
    """When this, do that."""

    name: Name
    when: Condition
    do: Do
    mode: Mode
    rollout: Rollout | None = Field(default=None, description="for whom it is enforced; for everybody if left out")
    alert: AlertEntry | None = Field(default=None, description="whom requests that it fires on wake, in shadow too")

    @model_validator(mode="after")
    def _rolled_out_if_enforced(self) -> Self:
        if self.rollout is not None and self.mode is not Mode.ENFORCE:
            raise ValueError(
                "'rollout' says for whom the rule is enforced, but it has mode: shadow. Use mode: enforce, or leave "
                "'rollout' out"
            )
        return self

    @model_validator(mode="after")
    def _free_name(self) -> Self:
        if self.name in RESERVED_RULES:
            raise ValueError(f"{self.name!r} is what decisions of that policy key are called; choose another name")
        return self

    @model_validator(mode="after")
    def _request_or_conversation(self) -> Self:
        if isinstance(self.when, WhenConversation):
            return self._of_conversation()
        for path in conversations_in(self.when):
            place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
            raise ValueError(
                f"when{place} is a verdict on a conversation, which stands alone: it is known between two requests, "
                "and no verdict of a request is known then. Make it a rule of its own"
            )
        if self.do.until is not None:
            raise ValueError("'until' says how long a rule over a conversation stands; 'stage: conversation' has one")
        if self.do.action is Action.STEER and self.do.gate is None:
            raise ValueError("'action: steer' also needs 'gate', latched or token")
        return self

    def _of_conversation(self) -> Self:
        if self.do.action not in _IN_CONVERSATIONS:
            raise ValueError(
                f"{self.do.action.value}s at the stage 'conversation', which is known between two requests: there is "
                "no reply to act on. Use flag, or steer or block, which act on the next request"
            )
        if self.do.gate is not None:
            raise ValueError(
                "'gate' belongs to rows of a request; at the stage 'conversation' whole requests are steered"
            )
        if self.do.scope is not None:
            raise ValueError("'scope' belongs to one choice of a request; at the stage 'conversation' all are blocked")
        return self

    @model_validator(mode="after")
    def _possible_action(self) -> Self:
        if self.do.action is not Action.STEER or isinstance(self.when, WhenConversation):
            return self
        for part in parts_of(self.when):
            place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in part.path)
            at = f" (when{place})" if place else ""
            late = "by then nothing is left to be written to. Use 'stage: prompt' or 'stage: stream'."
            if part.verdict.stage is Stage.RESPONSE:
                raise ValueError(f"steers at the stage 'response'{at}: {late}")
            if part.negated and part.verdict.stage is Stage.STREAM:
                raise ValueError(
                    f"steers on 'not' of a verdict at the stage 'stream'{at}, which is known only when the reply has "
                    f"ended: {late}"
                )
        return self

    @model_validator(mode="after")
    def _one_statistic(self) -> Self:
        if self.do.otherwise is not Otherwise.RELEASE:
            return self
        if not isinstance(self.when, When | WhenWeighed) or self.when.stage is Stage.PROMPT:
            raise ValueError(
                "'otherwise: release' compares the statistic of two replies: it needs a rule with one verdict, at the "
                "stage 'stream' or 'response'. Use 'otherwise: block'"
            )
        return self

    @model_validator(mode="after")
    def _one_moment(self) -> Self:
        stages = {part.verdict.stage is Stage.PROMPT for part in parts_of(self.when)}
        if self.do.action in DEFERRED and len(stages) > 1 and known_by_prompt(self.when):
            raise ValueError(
                f"{self.do.action.value}s on 'any' of a prompt's and a reply's verdict: what is done about a prompt is "
                "done once, what is done about a reply is looked at again. Make two rules of it"
            )
        return self
