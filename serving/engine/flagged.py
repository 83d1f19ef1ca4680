"""What made a rule fire on a request: the verdict whose detector, and whose tokens, an explanation is about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

import numpy as np
import numpy.typing as npt

from monitor.check import Check
from monitor.compiled import CompiledRule
from monitor.condition import verdicts_of
from monitor.events import Content
from monitor.policy import Plan
from monitor.segments import role_mask
from monitor.weighed import WeighedCheck
from probes.card import Stage
from serving.engine.records import Record


@dataclass(frozen=True, slots=True)
class Flagged:
    """A request on which a rule has fired, as far as it takes to explain it.

    Attributes:
        plan: that the request was under.
        about: whose request it was; without texts.
        decision: id of its event in the audit trail.
        rule: that fired; of several the one that decided, else the first.
        check: position in the plan of the check that the rule rests on and that fired; of a weighted sum the term with
            the largest weight.
        at: newest position when it fired; None where that is not known.
        steered: whether the request was written to.
    """

    plan: Plan
    about: Content
    decision: UUID
    rule: str
    check: int
    at: int | None
    steered: bool


def flagged_by(plan: Plan, record: Record, about: Content, decision: UUID, rules: Iterable[str]) -> Flagged | None:
    """What is to be explained of a request; None where no rule of its policy fired by a detector.

    Args:
        plan: that the request was under.
        record: of the request.
        about: whose it was.
        decision: id of its event.
        rules: names of those that fired.
    """
    names = set(rules)
    decided = record.decided.rule if record.decided is not None else None
    fired = [rule for rule in plan.policies[record.policy].rules if rule.name in names]
    for rule in sorted(fired, key=lambda rule: rule.name != decided):
        number = _fired_check(rule, record)
        if number is not None:
            at = record.trail.fired_at.get(number) if record.trail is not None else None
            return Flagged(plan, about, decision, rule.name, _read_check(plan, number), at, bool(record.steered))
    return None


def read_positions(
    check: Check, *, num_positions: int, num_prompt: int, stream_from: int, roles: npt.NDArray[np.uint8] | None
) -> npt.NDArray[np.intp]:
    """The positions that a check reads, in order.

    Args:
        check: it.
        num_positions: of the request.
        num_prompt: prompt tokens of it.
        stream_from: position from which its reply is read.
        roles: (num_prompt,) role codes of the prompt; None where every check reads everything.
    """
    read = np.zeros(num_positions, dtype=bool)
    if check.stage is Stage.PROMPT:
        read[:num_prompt] = True
        if check.segments is not None and roles is not None:
            read[:num_prompt] &= role_mask(check.segments)[roles][: len(read[:num_prompt])]
    else:
        read[stream_from:] = True
    read[: check.skip_first] = False
    return np.flatnonzero(read)


def _fired_check(rule: CompiledRule, record: Record) -> int | None:
    """Of a rule that fired, the first verdict that made it."""
    numbers = (number for number, negated in verdicts_of(rule.condition) if not negated)
    at = record.trail.fired_at if record.trail is not None else {}
    return next((n for n in numbers if n in at or (n < len(record.fired) and record.fired[n])), None)


def _read_check(plan: Plan, number: int) -> int:
    check = plan.checks[number]
    if isinstance(check, WeighedCheck):
        return max(check.terms, key=lambda term: abs(term.weight)).check
    return number
