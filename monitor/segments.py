"""What is known of a prompt beside its tokens: who wrote which of them, where the reply begins. Knows no engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from monitor.types import PromptEvent, Role

Codes = npt.NDArray[np.uint8]
"""One ``Role.code`` for each token or character."""


class Run(NamedTuple):
    """Consecutive tokens of one role; ``length`` is at least 1."""

    role: Role
    length: int


@dataclass(frozen=True, slots=True)
class PromptMap:
    """The roles of a prompt's tokens, and its trailing segment.

    Attributes:
        runs: they cover the whole prompt, in order; None where nobody knows: every rule reads everything then.
        stream_from: position from which ``stream`` rules read: the first token of the trailing assistant segment, or
            the number of prompt tokens where the reply begins with the first generated token.
        events: what was noticed while the prompt was made.
    """

    runs: tuple[Run, ...] | None
    stream_from: int
    events: tuple[PromptEvent, ...] = ()

    @classmethod
    def raw(cls, num_prompt: int) -> Self:
        """A prompt without messages: nobody says who wrote it, and all of it may be a reply that came back."""
        return cls((Run(Role.USER, num_prompt),), 0)

    @classmethod
    def unknown(cls, *, stream_from: int = 0) -> Self:
        """A chat whose tokens could not be told apart: no rule steps over any of them."""
        return cls(None, stream_from, (PromptEvent.SEGMENTS_UNKNOWN,))

    def codes(self, num_prompt: int) -> Codes | None:
        """(num_prompt,) role codes; None if they are unknown, or are those of another prompt."""
        if self.runs is None or sum(run.length for run in self.runs) != num_prompt:
            return None
        return np.repeat(
            np.array([run.role.code for run in self.runs], dtype=np.uint8),
            np.array([run.length for run in self.runs], dtype=np.int64),
        )


def runs_of(codes: Codes) -> tuple[Run, ...]:
    """Run-length encode role codes; undone by ``PromptMap.codes``."""
    if len(codes) == 0:
        return ()
    starts = np.flatnonzero(np.diff(codes, prepend=np.uint8(255)))
    lengths = np.diff(starts, append=len(codes))
    roles = tuple(Role)
    return tuple(Run(roles[codes[start]], int(length)) for start, length in zip(starts, lengths, strict=True))


def role_mask(roles: Iterable[Role]) -> npt.NDArray[np.bool_]:
    """(number of roles,) true at the codes of these roles."""
    mask = np.zeros(len(Role), dtype=bool)
    mask[[role.code for role in roles]] = True
    return mask
