"""One attempt at an answer, as long as the API process withholds its reply. Knows no engine and no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from monitor.attempt import Attempt
from monitor.types import ActionCode

if TYPE_CHECKING:
    from serving.engine.records import Record


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply that has ended.

    Attributes:
        request_id: the engine's.
        record: what is known of it.
        prompt: its tokens.
        tokens: as the model wrote them.
    """

    request_id: str
    record: Record
    prompt: Sequence[int]
    tokens: Sequence[int]

    @property
    def decided(self) -> ActionCode:
        """What was decided about it."""
        decided = self.record.decided
        return ActionCode(decided.action) if decided is not None else ActionCode.ALLOW


@dataclass(slots=True)
class Hold:
    """What is said in every request of one attempt, and what becomes of them.

    Attributes:
        attempt: which one.
        steers: of the attempt, by name: the share of their strength.
        refusal: rule and text of a block that is decided already.
        is_open: whether the reply is still withheld.
        signed: ids of the requests that have been sent to the engine, and how many choices each asks for.
        replies: by the engine's id, those that have ended.
    """

    attempt: Attempt = Attempt.FIRST
    steers: Mapping[str, float] = field(default_factory=dict)
    refusal: tuple[str, str] | None = None
    is_open: bool = True
    signed: list[tuple[str, int]] = field(default_factory=list)
    replies: dict[str, Reply] = field(default_factory=dict)
    _subjects: tuple[str, ...] = ()

    def sign(self, request_id: str, choices: int) -> str:
        """A request is sent to the engine.

        Args:
            request_id: the engine's.
            choices: that it asks for.
        Returns: whom rollouts by request take it for: in a later attempt, the one of the first attempt.
        """
        number = len(self.signed)
        self.signed.append((request_id, choices))
        return self._subjects[number] if number < len(self._subjects) else request_id

    def then(
        self,
        attempt: Attempt,
        *,
        steers: Mapping[str, float] | None = None,
        refusal: tuple[str, str] | None = None,
    ) -> Self:
        """The next attempt at the same answer: what was drawn for the first one holds for it."""
        subjects = self._subjects or tuple(name for name, _ in self.signed)
        return type(self)(attempt, steers or {}, refusal, _subjects=subjects)

    @property
    def only_request(self) -> str | None:
        """The engine's id where there is one request for one choice, so that all of it is known at its first token."""
        return self.signed[0][0] if len(self.signed) == 1 and self.signed[0][1] == 1 else None
