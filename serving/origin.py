"""Where a request came from, and what its messages became. Set by our middleware, read where the request is signed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Self

from monitor.events import Decision
from monitor.segments import PromptMap
from probes.card import Format
from serving.hold import Hold
from serving.sitting import Sitting

if TYPE_CHECKING:
    from monitor.policy import Plan


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, as far as the server has made sure of it.

    Attributes:
        tenant: who is behind its API key; empty where nobody tells.
        session: what the client calls its session; empty if it does not say.
        policy: that its requests get; None for the first.
    """

    tenant: str = ""
    session: str = ""
    policy: str | None = None


NOBODY = Caller()


class Judged(NamedTuple):
    """The end of a choice.

    Attributes:
        decision: its event.
        response_id: as the client knows it.
    """

    decision: Decision
    response_id: str | None


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Origin:
    """Where a request came from.

    Attributes:
        fmt: whether its text goes through the chat template.
        caller: who sent it.
        sitting: its part in its session; None where no rule is over conversations.
        tickets: of the events that have to be stored before anything more of its response leaves.
        plan: that was in force when it came, and that it keeps; None where nobody says: that of its signature.
        hold: the attempt at an answer, where its reply is withheld; None where nobody does.
        decisions: the events of its choices that have ended, if somebody listens; else None.
    """

    fmt: Format = Format.RAW
    caller: Caller = NOBODY
    sitting: Sitting | None = field(default=None, repr=False, compare=False)
    hold: Hold | None = field(default=None, repr=False, compare=False)
    plan: Plan | None = field(default=None, repr=False, compare=False)
    # One object for all tasks of a request: a chat is rendered in one task and, when streamed, signed in another.
    tickets: list[Future[None]] = field(default_factory=list, repr=False, compare=False)
    decisions: list[Judged] | None = field(default=None, repr=False, compare=False)
    _prompts: list[tuple[list[int], PromptMap]] = field(default_factory=list, repr=False, compare=False)

    def listening(self) -> Self:
        """The same request, whose decisions are noted from now on."""
        return replace(self, decisions=[])

    def tell(self, decision: Decision, response_id: str | None) -> None:
        """One of its choices has ended."""
        if self.decisions is not None:
            self.decisions.append(Judged(decision, response_id))

    def note(self, token_ids: Sequence[int], prompt: PromptMap) -> None:
        """Say what is known of a prompt that this request's messages became; of raw text there is nothing to say."""
        if self.fmt is not Format.RAW:
            self._prompts.append((list(token_ids), prompt))

    def prompt_of(self, token_ids: Sequence[int]) -> PromptMap:
        """What is known of a prompt: raw ones are raw; of a chat nothing, unless it was rendered for this request."""
        if self.fmt is Format.RAW:
            return PromptMap.raw(len(token_ids))
        wanted = list(token_ids)
        return next((prompt for noted, prompt in self._prompts if noted == wanted), PromptMap.unknown())


_NOBODY_SAID = Origin()
_CURRENT: ContextVar[Origin] = ContextVar("telltale_origin", default=_NOBODY_SAID)


def current_origin() -> Origin:
    """The origin of the request that this task serves; raw where nobody said."""
    return _CURRENT.get()


def enter_origin(origin: Origin) -> Token[Origin]:
    """Say where the request of this task comes from."""
    return _CURRENT.set(origin)


def leave_origin(token: Token[Origin]) -> None:
    """Undo ``enter_origin``."""
    _CURRENT.reset(token)
