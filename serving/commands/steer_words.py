"""What the commands that measure steers read and say alike."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from probes.errors import TelltaleError
from serving.commands.model import say

if TYPE_CHECKING:
    from probes.fit.steer.verdict import SteerVerdict


class StrengthsError(TelltaleError, ValueError):
    """``--strengths`` cannot be read."""


def strengths_of(text: str) -> tuple[float, ...]:
    """Read ``--strengths``.

    Raises:
        StrengthsError: it is no list of numbers.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise StrengthsError(
            f"--strengths is {text!r}; numbers with commas between them are read, for example 0.5,1,2."
        ) from error


def say_verdict(verdict: SteerVerdict) -> None:
    """Grade, recommended strength and reasons, a line each."""
    recommended = verdict.recommended
    say(f"{verdict.grade.value}; recommended strength: {'none' if recommended is None else f'{recommended:g}'}")
    for reason in verdict.reasons:
        say(reason)


def repeating(words: Sequence[str], options: Iterable[tuple[str, object]]) -> str:
    """The line that repeats a command; options without a value are left out."""
    given = [word for option, value in options if value is not None for word in (option, str(value))]
    return shlex.join([*words, *given])
