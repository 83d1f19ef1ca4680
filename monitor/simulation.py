"""What a policy would have done with a request, told from the statistics that were recorded of it.

Only what follows from the record is said: what does not is unknown, with its reason. A policy that was stopped where
another one would have gone on leaves a reply that was never written, and so nothing to judge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from monitor.compiled import CompiledPolicy, CompiledRule
from monitor.events import Decision, Verdict
from monitor.policy import Plan
from monitor.types import ON_GAP, ON_UNCALIBRATED, Action, Mode, Role
from monitor.verdicts import AnyCheck
from monitor.weighed import WeighedCheck
from probes.card import Stage

Truth = bool | None
_Key = tuple[str, Stage, str, tuple[Role, ...] | None]


class Unknown(StrEnum):
    """Why it cannot be told whether a check would have fired."""

    NOT_STORED = "not_stored"
    """No statistic of this detector with this aggregate, stage and segments was recorded."""
    OTHER_ARTIFACT = "other_artifact"
    """The recorded statistic is of another detector of that name."""
    CUT_OFF = "cut_off"
    """The reply was ended or replaced when it was recorded, or would have been (escalate, route, regenerate, block):
    nobody knows how it would have gone on, or what was read up to there."""
    CONVERSATION = "conversation"
    """A rule over conversations reads several requests of a session, and the record does not say which are one's."""
    LENGTH = "length"
    """The threshold depends on a length that was not recorded, and the statistic lies between the thresholds."""


@dataclass(frozen=True, slots=True)
class Told:
    """What is told of one rule and one request.

    Attributes:
        fires: whether it would have fired; None: cannot be told.
        mode: in which it would have; None: it is rolled out, and whom to cannot be told without the server's key.
        why: reasons where it cannot be told, by what is asked for.
    """

    fires: Truth
    mode: Mode | None
    why: Mapping[str, Unknown] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a policy would have done with one request.

    Attributes:
        rules: by name, with ``on_gap`` and ``on_uncalibrated``.
        least, most: the action would have been one from ``least`` to ``most``; the same where it can be told.
    """

    rules: Mapping[str, Told]
    least: Action
    most: Action

    @property
    def action(self) -> Action | None:
        """What would have been done; None: cannot be told."""
        return self.least if self.least is self.most else None


def simulate(plan: Plan, policy: CompiledPolicy, recorded: Decision) -> Simulated:
    """What a policy would have done.

    A request that would have been blocked at its prompt has no reply in which anything could fire. Of rules that fire
    in the same reply it is not known which comes first: all are told, also those behind a block.

    Args:
        plan: of the policy file.
        policy: one of its policies.
        recorded: what was seen of the request.
    """
    reader = _Reader(plan, recorded)
    told = {rule.name: _told(rule, reader, _Until.PROMPT) for rule in policy.rules}
    if any(told[rule.name].fires and _blocks(rule, told[rule.name]) for rule in policy.rules):
        told = {rule.name: _told(rule, reader, _Until.BLOCKED_PROMPT) for rule in policy.rules}
    else:
        at_prompt = any(
            told[rule.name].fires and _may_end(rule, told[rule.name]) and _replaces(rule) for rule in policy.rules
        )
        told = {rule.name: _told(rule, reader, _Until.END) for rule in policy.rules}
        ended = any(
            told[rule.name].fires is not False and _may_end(rule, told[rule.name])
            for rule in policy.rules
            if not rule.waits_for_end(plan.checks)
        )
        # Its reply would have been another one, or have had another end, than that whose statistics were recorded.
        told |= {
            rule.name: Told(fires=None, mode=told[rule.name].mode, why={"the reply": Unknown.CUT_OFF})
            for rule in policy.rules
            if (ended and rule.waits_for_end(plan.checks)) or (at_prompt and _reads_reply(rule, plan))
        }
    does = {rule.name: rule.action for rule in policy.rules} | {
        ON_GAP: policy.on_gap,
        ON_UNCALIBRATED: policy.on_uncalibrated,
    }
    told[ON_GAP] = Told(fires=bool(recorded.coverage.gaps), mode=Mode.ENFORCE)
    uncalibrated = policy.uncalibrated(plan.checks, recorded.format)
    told[ON_UNCALIBRATED] = Told(fires=uncalibrated, mode=Mode.ENFORCE)
    least = [does[name] for name, one in told.items() if one.fires and one.mode is Mode.ENFORCE]
    most = [does[name] for name, one in told.items() if one.fires is not False and one.mode is not Mode.SHADOW]
    # Those act on later requests of the session.
    told |= {
        rule.name: Told(fires=None, mode=rule.mode, why={"the session": Unknown.CONVERSATION})
        for rule in policy.conversations
    }
    return Simulated(told, _worst(least), _worst(most))


def _told(rule: CompiledRule, reader: _Reader, until: _Until) -> Told:
    if rule.conversation is not None:
        return Told(fires=False, mode=rule.mode)
    truth = rule.condition.truth(lambda number: reader.known(number, until))
    why = {reader.name(number): reason for number in rule.verdicts if (reason := reader.why(number, until)) is not None}
    mode = _mode(rule, reader.recorded)
    if truth is None and not why:
        # It rests on what is not calibrated for this format: then it does not fire.
        return Told(fires=False, mode=mode)
    return Told(fires=truth, mode=mode, why=why if truth is None else {})


def _mode(rule: CompiledRule, recorded: Decision) -> Mode | None:
    """A rule that is rolled out is drawn for; if it fired in the record, that says how."""
    if rule.share is None or rule.share.percent >= 100:  # noqa: PLR2004 - per cent
        return rule.mode
    if rule.share.percent <= 0:
        return Mode.SHADOW
    return next((acted.mode for acted in recorded.rules if acted.name == rule.name), None)


def _blocks(rule: CompiledRule, told: Told) -> bool:
    return rule.action is Action.BLOCK and told.mode is Mode.ENFORCE


def _may_end(rule: CompiledRule, told: Told) -> bool:
    """Whether the reply would have been ended, or be another one; of a rule that is rolled out too."""
    return rule.action.severity > Action.STEER.severity and told.mode is not Mode.SHADOW


def _replaces(rule: CompiledRule) -> bool:
    """Whether another reply may stand in the place of the one that was recorded."""
    return rule.action is not Action.BLOCK


def _reads_reply(rule: CompiledRule, plan: Plan) -> bool:
    return any(plan.checks[number].stage is not Stage.PROMPT for number in rule.verdicts)


def _worst(actions: list[Action]) -> Action:
    return max(actions, key=lambda action: action.severity, default=Action.ALLOW)


class _Until(Enum):
    """How far a request has come."""

    PROMPT = "prompt"
    """Its prompt is through."""
    BLOCKED_PROMPT = "blocked_prompt"
    """And there it ended: of the reply, which has no token, nothing can fire any more."""
    END = "end"
    """Its reply has ended as it did in the record."""


class _Reader:
    """Reads what is known of a plan's checks in one record."""

    def __init__(self, plan: Plan, recorded: Decision) -> None:
        self.recorded = recorded
        self._plan = plan
        self._stored: dict[_Key, Verdict] = {
            (verdict.detector, verdict.stage, verdict.aggregate, verdict.segments): verdict
            for verdict in recorded.verdicts
        }
        self._found: dict[int, Truth | Unknown] = {}

    def known(self, number: int, until: _Until) -> Truth:
        """Whether a check fired; None: not known, not calibrated for this format, or not judged yet."""
        if until is not _Until.END and self._plan.checks[number].stage is not Stage.PROMPT:
            calibrated = self.recorded.format in self._plan.checks[number].thresholds
            return False if until is _Until.BLOCKED_PROMPT and calibrated else None
        found = self._judged(number)
        return None if isinstance(found, Unknown) else found

    def why(self, number: int, until: _Until) -> Unknown | None:
        """Why it cannot be told; None: it can, or it is not calibrated."""
        if until is not _Until.END and self._plan.checks[number].stage is not Stage.PROMPT:
            return None
        found = self._judged(number)
        return found if isinstance(found, Unknown) else None

    def name(self, number: int) -> str:
        """What is asked for, in words."""
        check = self._plan.checks[number]
        segments = f" of {', '.join(check.segments)}" if check.segments is not None else ""
        return f"{check.statistic} of {check.detector} at {check.stage.value}{segments}"

    def _judged(self, number: int) -> Truth | Unknown:
        if number not in self._found:
            self._found[number] = self._judge(self._plan.checks[number])
        return self._found[number]

    def _judge(self, check: AnyCheck) -> Truth | Unknown:
        if self.recorded.format not in check.thresholds:
            return None
        statistic = self._statistic(check)
        if isinstance(statistic, Unknown):
            return statistic
        low, high = self._limits(check)
        cut = self._is_cut(check)
        # At the stage response a statistic may still have fallen; at the others it only rises.
        if statistic > high and not (cut and check.stage is Stage.RESPONSE):
            return True
        if cut:
            return Unknown.CUT_OFF
        return False if statistic <= low else Unknown.LENGTH

    def _statistic(self, check: AnyCheck) -> float | Unknown:
        """Of a check; -inf where it was never defined."""
        stored = self._stored.get((check.detector, check.stage, check.statistic, check.segments))
        if isinstance(check, WeighedCheck):
            # Its name says its factors and its terms, not what made statistics of scores: it is added up anew.
            return self._sum(check)
        if stored is None:
            return Unknown.NOT_STORED
        if self.recorded.artifacts.get(check.detector) != self._plan.cards[check.detector].tensors_digest:
            return Unknown.OTHER_ARTIFACT
        return -math.inf if stored.statistic is None else stored.statistic

    def _sum(self, check: WeighedCheck) -> float | Unknown:
        total = 0.0
        for term in check.terms:
            found = self._statistic(self._plan.checks[term.check])
            if isinstance(found, Unknown):
                return found
            if not math.isfinite(found):
                return -math.inf
            if term.scaling is not None:
                scaling = term.scaling[self.recorded.format]
                found = 0.5 + 0.5 * math.tanh((scaling.slope * found + scaling.intercept) / 2.0)
            total += term.weight * found
        return total

    def _limits(self, check: AnyCheck) -> tuple[float, float]:
        """The lowest and the highest threshold that may have applied."""
        limits, prompt = check.by_length.get(self.recorded.format), self.recorded.prompt_tokens
        if limits is None or check.stage is Stage.STREAM:
            value = check.thresholds[self.recorded.format]
            return value, value
        if check.stage is Stage.PROMPT and prompt is not None:
            value = limits.at(max(0, prompt - check.skip_first))
            return value, value
        return min(limits.values), max(limits.values)

    def _is_cut(self, check: AnyCheck) -> bool:
        """Whether more would have been read, had the request gone on."""
        if self.recorded.prompt_tokens is None:
            return True
        return self.recorded.action.severity > Action.STEER.severity and check.stage is not Stage.PROMPT
