"""What an accumulator is: a running number over the requests of a session. Knows no detector and no store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

State = tuple[float, ...]
"""All that is remembered between two requests, as plain numbers, so that any store can keep it."""


class Step(NamedTuple):
    """What one request makes of a state.

    Attributes:
        state: to be remembered.
        value: that is judged; ``-inf`` where it is not yet defined.
    """

    state: State
    value: float


class Accumulator(BaseModel, ABC):
    """A running number over the statistics of a session's requests, in the order in which they ended.

    One file per accumulator. The fields of a subclass are its parameters; they appear in the policy file's schema.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: ClassVar[str]

    @abstractmethod
    def start(self) -> State:
        """The state before the first request."""

    @abstractmethod
    def step(self, state: State, statistic: float, now: float) -> Step:
        """Take in one request.

        Args:
            state: as ``start`` or the step before gave it.
            statistic: of the request; finite.
            now: when it ended, in seconds; a clock that went back counts as one that stood still.
        """

    def config(self) -> dict[str, Any]:
        """The parameters as they stand in a policy file."""
        return {"kind": self.kind, **self.model_dump(mode="json")}

    def __str__(self) -> str:
        parameters = ",".join(f"{key}={value}" for key, value in self.model_dump(mode="json").items())
        return f"{self.kind}({parameters})" if parameters else self.kind
