"""A rule of the policy file as data: when, what is done, and whether it is done. Knows no detector and no engine."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from monitor.rollout import Subject
from monitor.strict import Name, Strict
from monitor.types import RESERVED_RULES, Action, Mode
from monitor.when import Condition, WhenConversation, conversations_in, parts_of
from probes.card import Stage


class Gate(StrEnum):
    """Which of the rows that a steer may write to are written to."""

    TOKEN = "token"  # noqa: S105 - no secret
    """Those that lie above the rule's threshold themselves."""
    LATCHED = "latched"
    """All behind the first one that made the rule fire."""


_TOO_LATE = {
    Action.BLOCK: "by then the reply has been sent. Use 'stage: stream', which stops it at the token that shows it, or "
    "'action: flag'.",
    Action.STEER: "by then nothing is left to be written to. Use 'stage: prompt' or 'stage: stream'.",
}


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


class Do(Strict):
    """What a rule does."""

    action: Literal[Action.FLAG, Action.STEER, Action.BLOCK]
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

    until: Until | None = Field(
        default=None,
        description="how long a rule over a conversation stands against the session's next requests: end, as long as "
        "the session lasts (the default), or a time, 30m",
    )

    @model_validator(mode="after")
    def _text_of_block(self) -> Self:
        if self.text is not None and self.action is not Action.BLOCK:
            raise ValueError("'text' is what a blocked reply says; only 'action: block' has one")
        if self.scope is not None and self.action is not Action.BLOCK:
            raise ValueError("'scope' says which choices a block stops; only 'action: block' has one")
        return self

    @model_validator(mode="after")
    def _steer_of_steer(self) -> Self:
        if self.action is Action.STEER and self.steer is None:
            raise ValueError("'action: steer' also needs 'steer', the name of one, and 'gate', latched or token")
        if self.action is not Action.STEER and (self.steer is not None or self.gate is not None):
            raise ValueError("'steer' and 'gate' say how to steer; only 'action: steer' has them")
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
            raise ValueError("'action: steer' also needs 'steer', the name of one, and 'gate', latched or token")
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
        action = self.do.action
        if action not in _TOO_LATE or isinstance(self.when, WhenConversation):
            return self
        for part in parts_of(self.when):
            place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in part.path)
            at = f" (when{place})" if place else ""
            if part.verdict.stage is Stage.RESPONSE:
                raise ValueError(f"{action.value}s at the stage 'response'{at}: {_TOO_LATE[action]}")
            if part.negated and part.verdict.stage is Stage.STREAM:
                raise ValueError(
                    f"{action.value}s on 'not' of a verdict at the stage 'stream'{at}, which is known only when the "
                    f"reply has ended: {_TOO_LATE[action]}"
                )
        return self
