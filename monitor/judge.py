"""The judge: statistics above their limits, gaps and rules that fire become actions on requests. Reads no scores."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from monitor.check import LengthLimits
from monitor.compiled import CompiledPolicy, CompiledRule
from monitor.condition import KnownVerdict, Truth
from monitor.policy import Plan
from monitor.request import Decision, Float64, Index, Request
from monitor.rule import Scope
from monitor.state import StateTable
from monitor.tally import Tally
from monitor.types import ON_GAP, ON_SESSION_FAILURE, RESERVED_RULES, Action, ActionCode, Gap, Mode
from monitor.verdicts import AnyCheck
from probes.card import Format, Stage


class Judge:
    """Decides about live requests by their policies. A request's action only ever rises.

    Args:
        plan: checks and policies.
        table: where the statistics of live requests stand.

    Attributes:
        plan: as given.
        tally: what happened since it was taken last.
    """

    def __init__(self, plan: Plan, table: StateTable) -> None:
        self.plan = plan
        self.tally = Tally()
        self._table = table
        rules = [rule for policy in plan.policies for rule in policy.rules]
        self._waits_for_prompts = any(rule.waits_for_prompt(plan.checks) for rule in rules)
        self._end_rules = [
            [rule for rule in policy.rules if rule.waits_for_end(plan.checks)] for policy in plan.policies
        ]
        self._ends_may_negate = any(rule.waits_for_unfired_end(plan.checks) for rule in rules)
        self._judges_ends = any(check.stage is Stage.RESPONSE for check in plan.checks) or any(self._end_rules)
        self._limits = {
            (number, fmt): self._limit_row(policy, fmt) for number, policy in enumerate(plan.policies) for fmt in Format
        }
        self._lengths = {
            (number, fmt): found
            for number, policy in enumerate(plan.policies)
            for fmt in Format
            if (found := self._length_limits(policy, fmt))
        }

    def is_uncalibrated(self, request: Request) -> bool:
        """Whether a rule that is enforced for a request is not calibrated for its format."""
        return self._policy_of(request).uncalibrated(self.plan.checks, request.fmt, request.outside)

    def limits(self, policy: int, fmt: Format) -> tuple[Float64, Float64]:
        """Above which checks fire while a request runs, and at its end: each (checks,), as the table's columns.

        Of checks whose thresholds depend on a length, ``set_by_length`` has to follow.
        """
        return self._limits[policy, fmt]

    def set_by_length(self, request: Request) -> None:
        """Set the limits of a new request that depend on the length of its prompt.

        With ``segments`` too, the length is that of the whole prompt: thresholds were calibrated on whole prompts.
        """
        for column, check, limits in self._lengths.get((request.policy, request.fmt), ()):
            if check.stage is Stage.PROMPT:
                length = max(0, request.num_prompt - check.skip_first)
                self._table.limits[request.slot, column] = limits.at(length)
        self._set_at_end(request)

    def judge(self, live: Mapping[str, Request], request_ids: Sequence[str], numbers: Index, slots: Index) -> None:
        """Let fire what lies above its limit.

        Args:
            live: requests by their ids.
            request_ids: of a step.
            numbers: (R,) those of them that are judged.
            slots: (R,) theirs.
        """
        if len(slots) == 0:
            return
        began = time.perf_counter()
        table = self._table
        table.weigh(slots)
        found = set()
        for place, column in table.above(slots):
            if self._has_fired(slots[place], column):
                found.add(place)
                self._note(live[request_ids[numbers[place]]], column)
        if self._waits_for_prompts:
            found.update(self._prompts_done(slots))
        for place in sorted(found):
            self._decide(live[request_ids[numbers[place]]])
        self.tally.policy_seconds += time.perf_counter() - began

    def judge_end(self, request: Request) -> None:
        """The reply has ended: let fire what is judged only then."""
        if not self._judges_ends:
            return
        slots = np.array([request.slot])
        self._table.weigh(slots)
        above = self._above_at_end([request], slots)[0]
        self._table.fired[request.slot] |= above
        for column in np.flatnonzero(above):
            self._note(request, int(column))
        self._decide(request, ended=True)

    def if_ended(
        self, requests: Sequence[Request], slots: Index
    ) -> tuple[npt.NDArray[np.bool_], Mapping[str, Decision]]:
        """What has fired and what is decided, as if each reply ended here.

        Args:
            requests: R live ones.
            slots: (R,) theirs.
        Returns: (R, checks) as the table's columns, maybe a view; and by the request's id every decision but allow.
        """
        decided = {
            request.request_id: Decision(request.action, request.rule, request.text)
            for request in requests
            if request.action is not ActionCode.ALLOW
        }
        fired = self._table.of(self._table.fired, slots)
        if not self._judges_ends:
            return fired, decided
        above = self._above_at_end(requests, slots)
        ended = fired | above
        # Without "not" in any rule, one can only become true by a verdict that has not fired yet.
        rows = range(len(requests)) if self._ends_may_negate else np.flatnonzero(above.any(axis=1)).tolist()
        for row in rows:
            request = requests[row]
            found = self._decision_at_end(request, ended[row])
            if found.action is not ActionCode.ALLOW:
                decided[request.request_id] = found
        return ended, decided

    def gap(self, request: Request, reason: Gap, count: int) -> None:
        """Positions that should have been scored and were not: count them, and act on them."""
        request.gaps[reason] += count
        self.tally.gaps[reason] += count
        policy = self._policy_of(request)
        self.act(request, ON_GAP, policy.on_gap, Mode.ENFORCE, policy.text)

    def act(self, request: Request, rule: str, action: Action, mode: Mode, text: str) -> None:
        """A rule, or one of the reserved names, acts on a request: once."""
        if self._is_new(request, rule, action, mode) and mode is Mode.ENFORCE:
            request.raise_to(action, rule, text)

    def refuse(self, request: Request, rule: str, text: str) -> None:
        """What is decided already: nothing more is, and nothing is counted twice."""
        request.counted = False
        request.decided.update(RESERVED_RULES, (known.name for known in self._policy_of(request).rules))
        request.raise_to(Action.BLOCK, rule, text)

    def impose(self, request: Request, names: Collection[str]) -> None:
        """Let act on a new request what stands against its session, in the order of the file.

        Args:
            request: just admitted.
            names: of rules over conversations, or ``on_session_failure``.
        """
        policy = self._policy_of(request)
        for rule in policy.conversations if names else ():
            if rule.name in names:
                self._apply(request, rule)
        if ON_SESSION_FAILURE in names:
            self.act(request, ON_SESSION_FAILURE, self.plan.on_session_failure, Mode.ENFORCE, policy.text)

    def take_tally(self) -> Tally:
        """Counts since the call before."""
        tally, self.tally = self.tally, Tally()
        return tally

    def _is_new(self, request: Request, rule: str, action: Action, mode: Mode) -> bool:
        if rule in request.decided:
            return False
        request.decided.add(rule)
        self.tally.acted[rule, action, mode, self._policy_of(request).name] += 1
        return True

    def _has_fired(self, slot: int, column: int) -> bool:
        """Note that a statistic lies above its limit, unless it is too early to say so."""
        table = self._table
        # Not before the prompt is complete: which of two rules decides must not depend on how it was cut into chunks.
        if table.next_position[slot] < table.num_prompt[slot]:
            return False
        table.limits[slot, column] = np.nan
        table.fired[slot, column] = True
        return True

    def _note(self, request: Request, column: int) -> None:
        """Note where a check has fired."""
        request.fired_at[int(self._table.order[column])] = int(self._table.next_position[request.slot]) - 1

    def _prompts_done(self, slots: Index) -> list[int]:
        """Places in ``slots`` of requests whose prompt is through since this was asked last."""
        table = self._table
        done = (table.next_position[slots] >= table.num_prompt[slots]) & ~table.prompt_judged[slots]
        table.prompt_judged[slots[done]] = True
        return [int(place) for place in np.flatnonzero(done)]

    def _decide(self, request: Request, *, ended: bool = False) -> None:
        """Let act whose condition has become true, in the order of the file: of two as severe, the first decides."""
        known = self._known(request, self._table.fired[request.slot], ended=ended)
        for rule in self._policy_of(request).rules:
            if rule.name not in request.decided and rule.condition.truth(known):
                self._apply(request, rule)

    def _apply(self, request: Request, rule: CompiledRule) -> None:
        mode = _mode(request, rule)
        if self._is_new(request, rule.name, rule.action, mode) and mode is Mode.ENFORCE:
            does, ends = rule.does(request.attempt), rule.ends(request.attempt)
            request.raise_to(does, rule.name, rule.text, ends=ends)
        if rule.scope is Scope.REQUEST and mode is Mode.ENFORCE and request.choices is not None:
            request.choices.block(rule.name, rule.text)
        if rule.steer is not None and rule.gate is None and mode is Mode.ENFORCE:
            request.steers.add(rule.steer)

    def _decision_at_end(self, request: Request, fired: npt.NDArray[np.bool_]) -> Decision:
        """What is decided about a live request if its reply ends here and these checks have fired."""
        decided = Decision(request.action, request.rule, request.text)
        known = self._known(request, fired, ended=True)
        for rule in self._end_rules[request.policy]:
            code = ActionCode(rule.does(request.attempt).severity)
            acts = _mode(request, rule) is Mode.ENFORCE
            if acts and code > decided.action and rule.condition.truth(known):
                decided = Decision(code, rule.name, rule.text)
        return decided

    def _known(self, request: Request, fired: npt.NDArray[np.bool_], *, ended: bool) -> KnownVerdict:
        """What is known of a request's verdicts.

        One that has fired is true for good. One that has not is false only once it cannot any more: at the stage prompt
        when the prompt is through, else when the reply has ended. In a format without threshold nothing is known.
        """
        table = self._table
        prompt_done = table.next_position[request.slot] >= table.num_prompt[request.slot]

        def known(number: int) -> Truth:
            check = self.plan.checks[number]
            if fired[table.column_of[number]]:
                return True
            judged = prompt_done if check.stage is Stage.PROMPT else ended
            return False if judged and request.fmt in check.thresholds else None

        return known

    def _above_at_end(self, requests: Sequence[Request], slots: Index) -> npt.NDArray[np.bool_]:
        """(R, checks) in the order of the table: those at the stage response that fire if each reply ends here."""
        table = self._table
        for row in np.flatnonzero(table.next_position[slots] > table.end_limits_hold_to[slots]):
            self._set_at_end(requests[row])
        return np.asarray(table.of(table.statistics, slots) > table.of(table.limits_at_end, slots))

    def _set_at_end(self, request: Request) -> None:
        """Set the limits at the end that depend on the length of what has been read by now."""
        table, slot = self._table, request.slot
        hold_to = np.iinfo(np.int64).max
        for column, check, limits in self._lengths.get((request.policy, request.fmt), ()):
            if check.stage is Stage.RESPONSE:
                start = max(request.stream_from, check.skip_first)
                length = max(0, int(table.next_position[slot]) - start)
                table.limits_at_end[slot, column] = limits.at(length)
                longest = limits.longest(length)
                if longest is not None:
                    hold_to = min(hold_to, start + longest)
        table.end_limits_hold_to[slot] = hold_to

    def _policy_of(self, request: Request) -> CompiledPolicy:
        return self.plan.policies[request.policy]

    def _limit_row(self, policy: CompiledPolicy, fmt: Format) -> tuple[Float64, Float64]:
        """In the order of the table's columns: limits of what is judged while the request runs, and at its end."""
        row = np.full(len(self.plan.checks), np.nan)
        for check in policy.checks:
            thresholds: Mapping[Format, float] = self.plan.checks[check].thresholds
            row[check] = thresholds.get(fmt, np.nan)
        at_end = np.array([check.stage is Stage.RESPONSE for check in self.plan.checks], dtype=bool)
        order = self._table.order
        return np.where(at_end, np.nan, row)[order], np.where(at_end, row, np.nan)[order]

    def _length_limits(self, policy: CompiledPolicy, fmt: Format) -> list[tuple[int, AnyCheck, LengthLimits]]:
        """Columns of the policy's checks whose limits depend on the length of what is read."""
        checks = ((self._table.column_of[number], self.plan.checks[number]) for number in policy.checks)
        return [(column, check, check.by_length[fmt]) for column, check in checks if fmt in check.by_length]


def _mode(request: Request, rule: CompiledRule) -> Mode:
    """A rule outside of whose rollout a request is runs in shadow."""
    return Mode.SHADOW if rule.name in request.outside else rule.mode
