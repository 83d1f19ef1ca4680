"""Conditions of rules made ready: what is known of verdicts decides what is known of a rule. Plain logic.

The logic is Kleene's strong one of three values (Introduction to Metamathematics, 1952, section 64): true, false, and
None for what is not known yet. Whatever it makes of verdicts that are not known yet, it makes of them whichever way
they turn out; so a condition that is true or false stays so, however the tokens of a request were cut into steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Truth = bool | None
"""None: not known yet."""
KnownVerdict = Callable[[int], Truth]
"""What is known of the verdict at a position of the plan."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict at the position ``number`` of the plan's verdicts."""

    number: int

    def truth(self, known: KnownVerdict) -> Truth:
        """What is known of the verdict."""
        return known(self.number)


@dataclass(frozen=True, slots=True)
class AllOf:
    """All of ``parts``."""

    parts: tuple[Condition, ...]

    def truth(self, known: KnownVerdict) -> Truth:
        """False as soon as one part is; true once all are."""
        found = [part.truth(known) for part in self.parts]
        return False if False in found else (None if None in found else True)


@dataclass(frozen=True, slots=True)
class AnyOf:
    """One of ``parts``."""

    parts: tuple[Condition, ...]

    def truth(self, known: KnownVerdict) -> Truth:
        """True as soon as one part is; false once none can be."""
        found = [part.truth(known) for part in self.parts]
        return True if True in found else (None if None in found else False)


@dataclass(frozen=True, slots=True)
class NotOf:
    """The opposite of ``part``."""

    part: Condition

    def truth(self, known: KnownVerdict) -> Truth:
        """Not known as long as the part is not."""
        found = self.part.truth(known)
        return None if found is None else not found


Condition = Verdict | AllOf | AnyOf | NotOf
NEVER = AnyOf(())
"""Nothing in a request makes it true."""


def verdicts_of(condition: Condition, *, negated: bool = False) -> Iterator[tuple[int, bool]]:
    """The verdicts of a condition, and whether an odd number of ``not`` stands around each."""
    match condition:
        case Verdict():
            yield condition.number, negated
        case NotOf():
            yield from verdicts_of(condition.part, negated=not negated)
        case AllOf() | AnyOf():
            for part in condition.parts:
                yield from verdicts_of(part, negated=negated)
