"""Lets the monitor judge a recorded request, in the steps in which an engine would have brought it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt

from monitor.attempt import Attempt
from monitor.compiled import CompiledPolicy
from monitor.monitor import Monitor, StepReadouts
from monitor.policy import Plan
from monitor.request import Float64, Request, is_blocked
from monitor.segments import PromptMap, Run
from monitor.trial.cases import Case, CaseError, Expected, Trace
from monitor.types import Action
from probes.bank import Bank
from probes.card import Format, Stage

_NAME = "case"


class RecordedBank(Bank):
    """A bank that is given scores in the place of readouts.

    Args:
        bank: whose detectors gave them.
    """

    def __init__(self, bank: Bank) -> None:
        vars(self).update(vars(bank))

    @property
    def width(self) -> int:
        """Numbers in a row: all scores."""
        return self.num_scores

    def used_columns(self) -> npt.NDArray[np.intp]:
        """All of them."""
        return np.arange(self.num_scores, dtype=np.intp)

    def score(self, readouts: npt.NDArray[np.floating]) -> Float64:
        """As they were recorded."""
        return np.asarray(readouts, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Found:
    """What a policy did about a request.

    Attributes:
        action: the most severe that was enforced.
        rule: what decided it; None: nothing did.
        stage: when it was decided.
        at: newest position when it was decided; None where it was before the first token was read.
        rules: all that fired, in shadow too.
    """

    action: Action
    rule: str | None
    stage: Stage | None
    at: int | None
    rules: tuple[str, ...]

    def differing(self, expected: Expected) -> list[str]:
        """What is not as it was expected, one line each."""
        lines = []
        for key in expected.model_fields_set:
            wanted, found = getattr(expected, key), getattr(self, key)
            if key == "rules" and wanted is not None:
                wanted, found = tuple(sorted(wanted)), tuple(sorted(found))
            if wanted != found:
                lines.append(f"{key}: expected {_shown(wanted)}, found {_shown(found)}")
        return sorted(lines)


class Trial:
    """A policy file that is tried on cases.

    Args:
        plan: compiled.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = replace(plan, bank=RecordedBank(plan.bank))
        self._policies = {policy.name: policy for policy in plan.policies}

    def run(self, case: Case, trace: Trace) -> Found:
        """Let a policy judge a request.

        Rollouts do not count: every rule is enforced for it, as for a request that nobody vouches for.

        Args:
            case: says which policy.
            trace: the request.
        Raises:
            CaseError: there is no such policy, or scores are missing that it reads.
        """
        policy = self._policy(case)
        scores = self._rows(case, trace, policy)
        monitor = Monitor(self._plan)
        request = monitor.admit(
            _NAME,
            num_prompt=trace.num_prompt,
            policy=policy.name,
            fmt=trace.format,
            prompt=_map(trace),
            attempt=Attempt.FIRST,
        )
        decided: tuple[Action, Stage | None, int | None] = (request.action.action, Stage.PROMPT, None)
        fed = 0
        # The prompt in one step, then token by token; a block ends the request where an engine would.
        for end in range(trace.num_prompt, len(scores) + 1):
            if is_blocked(request):
                break
            monitor.observe(_step(scores, fed, end))
            fed = end
            if request.action.action is not decided[0]:
                stage = Stage.PROMPT if end == trace.num_prompt else Stage.STREAM
                decided = request.action.action, stage, end - 1
        sampled = max(0, fed - trace.num_prompt) + 1
        monitor.finish(_NAME, num_positions=fed + 1, sampled=sampled, aborted=False)
        if request.action.action is not decided[0]:
            decided = request.action.action, Stage.RESPONSE, fed - 1
        return _found(request, decided)

    def _policy(self, case: Case) -> CompiledPolicy:
        if case.policy is None:
            return self._plan.policies[0]
        if case.policy not in self._policies:
            raise CaseError(
                f"case {case.name!r}: the policy {case.policy!r} is not known: {', '.join(self._policies)}."
            )
        return self._policies[case.policy]

    def _rows(self, case: Case, trace: Trace, policy: CompiledPolicy) -> Float64:
        """(tokens, scores of the bank); detectors of which no rule reads anything are at zero."""
        bank = self._plan.bank
        known = {detector.name: detector for detector in bank.detectors}
        rows = np.zeros((trace.num_prompt + trace.num_reply, bank.num_scores))
        for name, given in trace.scores.items():
            if name not in known:
                raise CaseError(f"case {case.name!r}: the policy file has no detector {name!r}.")
            first, channels = bank.index[name], known[name].channels
            found = [np.atleast_1d(np.asarray(row, dtype=np.float64)) for row in (*given.prompt, *given.reply)]
            wrong = next((len(row) for row in found if len(row) != channels), None)
            if wrong is not None:
                raise CaseError(
                    f"case {case.name!r}: detector {name!r} gives {channels} numbers for a token, not {wrong}."
                )
            rows[:, first : first + channels] = found
        for rule in policy.rules:
            for number in rule.verdicts:
                for name in _detectors(self._plan, number):
                    if name not in trace.scores:
                        raise CaseError(
                            f"case {case.name!r}: the rule {rule.name!r} reads {name!r}, of which it has no scores."
                        )
        return rows


def _detectors(plan: Plan, number: int) -> list[str]:
    check = plan.checks[number]
    terms = getattr(check, "terms", None)
    return [term.name for term in terms] if terms is not None else [check.detector]


def _map(trace: Trace) -> PromptMap:
    stream_from = trace.num_prompt if trace.stream_from is None else min(trace.stream_from, trace.num_prompt)
    if trace.segments:
        return PromptMap(tuple(Run(run.role, run.tokens) for run in trace.segments), stream_from)
    if trace.format is Format.RAW and trace.stream_from is None:
        return PromptMap.raw(trace.num_prompt)
    return PromptMap(None, stream_from)


def _step(scores: Float64, start: int, end: int) -> StepReadouts:
    return StepReadouts(
        [_NAME],
        np.array([end - start], dtype=np.int64),
        np.zeros(1, dtype=np.int64),
        np.arange(start, end, dtype=np.int64),
        # Scores are float64, whatever the engine's readouts are.
        cast("npt.NDArray[np.float32]", scores[start:end]),
    )


def _found(request: Request, decided: tuple[Action, Stage | None, int | None]) -> Found:
    nothing = request.action.action is Action.ALLOW
    return Found(
        action=request.action.action,
        rule=None if nothing else request.rule,
        stage=None if nothing else decided[1],
        at=None if nothing else decided[2],
        rules=tuple(sorted(request.decided)),
    )


def _shown(value: object) -> str:
    return "nothing" if value is None else ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
