"""The judge: statistics above their limits, gaps and rules that fire become actions on requests. Reads no scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from monitor.check import Check, LengthLimits
from monitor.policy import CompiledPolicy, Plan
from monitor.request import Float64, Index, Request
from monitor.state import StateTable
from monitor.tally import Tally
from monitor.types import ON_GAP, Action, ActionCode, Gap, Mode
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
        self._judges_ends = any(check.stage is Stage.RESPONSE for check in plan.checks)
        self._limits = {
            (number, fmt): self._limit_row(policy, fmt) for number, policy in enumerate(plan.policies) for fmt in Format
        }
        self._lengths = {
            (number, fmt): found
            for number, policy in enumerate(plan.policies)
            for fmt in Format
            if (found := self._length_limits(policy, fmt))
        }
        self._uncalibrated = {
            (number, fmt)
            for number, policy in enumerate(plan.policies)
            for fmt in Format
            if policy.uncalibrated(plan.checks, fmt)
        }

    def is_uncalibrated(self, policy: int, fmt: Format) -> bool:
        """Whether a policy, by its position in the plan, has a check that is not calibrated for this format."""
        return (policy, fmt) in self._uncalibrated

    def limits(self, policy: int, fmt: Format) -> Float64:
        """(checks,) in the order of the table's columns: above which a check fires while a request runs.

        Of a check whose threshold depends on the prompt's length, ``set_by_length`` has to follow.
        """
        return self._limits[policy, fmt][0]

    def set_by_length(self, request: Request) -> None:
        """Set the limits of a new request that depend on the length of its prompt.

        With ``segments`` too, the length is that of the whole prompt: thresholds were calibrated on whole prompts.
        """
        for column, check, limits in self._lengths.get((request.policy, request.fmt), ()):
            if check.stage is Stage.PROMPT:
                length = max(0, request.num_prompt - check.skip_first)
                self._table.limits[request.slot, column] = limits.at(length)

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
        table = self._table
        # In the order of the policy's rules: of two that are as severe, the first decides.
        for place, column in sorted(table.above(slots), key=lambda found: (found[0], table.order[found[1]])):
            slot = slots[place]
            # Not before the prompt is complete: which of two rules decides must not depend on how it was cut into
            # chunks.
            if table.next_position[slot] < table.num_prompt[slot]:
                continue
            table.limits[slot, column] = np.nan
            self._fire(live[request_ids[numbers[place]]], column)

    def judge_end(self, request: Request) -> None:
        """The reply has ended: let fire what is judged only then."""
        for column in np.flatnonzero(self._above_at_end(request)):
            self._fire(request, int(column))

    def fired_if_ended(self, requests: Sequence[Request]) -> npt.NDArray[np.bool_]:
        """(R, checks) in the order of the table's columns: what has fired, as if each reply ended here."""
        fired = self._table.fired[[request.slot for request in requests]]
        if self._judges_ends:
            for row, request in enumerate(requests):
                fired[row] |= self._above_at_end(request)
        return fired

    def decision_if_ended(self, request: Request) -> tuple[ActionCode, str, str]:
        """Action, rule and refusal of a live request, as if its reply ended here."""
        decided = request.action, request.rule, request.text
        if not self._judges_ends:
            return decided
        for column in np.flatnonzero(self._above_at_end(request)):
            for rule in self._policy_of(request).rules:
                code = ActionCode(rule.action.severity)
                if rule.check == self._table.order[column] and rule.mode is Mode.ENFORCE and code > decided[0]:
                    decided = code, rule.name, rule.text
        return decided

    def gap(self, request: Request, reason: Gap, count: int) -> None:
        """Positions that should have been scored and were not: count them, and act on them."""
        request.gaps[reason] += count
        self.tally.gaps[reason] += count
        policy = self._policy_of(request)
        self.act(request, ON_GAP, policy.on_gap, Mode.ENFORCE, policy.text)

    def act(self, request: Request, rule: str, action: Action, mode: Mode, text: str) -> None:
        """A rule, or one of the reserved names, acts on a request: once."""
        if rule in request.decided:
            return
        request.decided.add(rule)
        self.tally.acted[rule, action, mode] += 1
        if mode is Mode.ENFORCE:
            request.raise_to(action, rule, text)

    def take_tally(self) -> Tally:
        """Counts since the call before."""
        tally, self.tally = self.tally, Tally()
        return tally

    def _fire(self, request: Request, column: int) -> None:
        self._table.fired[request.slot, column] = True
        check = int(self._table.order[column])
        request.fired_at[check] = int(self._table.next_position[request.slot]) - 1
        for rule in self._policy_of(request).rules:
            if rule.check == check:
                self.act(request, rule.name, rule.action, rule.mode, rule.text)
                if rule.steer is not None and rule.gate is None and rule.mode is Mode.ENFORCE:
                    request.steers.add(rule.steer)

    def _above_at_end(self, request: Request) -> npt.NDArray[np.bool_]:
        """(checks,) in the order of the table: those at the stage response that fire if the reply ends here."""
        _, at_end = self._limits[request.policy, request.fmt]
        if by_length := self._lengths.get((request.policy, request.fmt)):
            at_end = at_end.copy()
            read_to = int(self._table.next_position[request.slot])
            for column, check, limits in by_length:
                if check.stage is Stage.RESPONSE:
                    length = max(0, read_to - max(request.stream_from, check.skip_first))
                    at_end[column] = limits.at(length)
        return np.asarray(self._table.statistics[request.slot] > at_end)

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

    def _length_limits(self, policy: CompiledPolicy, fmt: Format) -> list[tuple[int, Check, LengthLimits]]:
        """Columns of the policy's checks whose limits depend on the length of what is read."""
        columns = {int(check): column for column, check in enumerate(self._table.order)}
        checks = ((number, self.plan.checks[number]) for number in policy.checks)
        return [(columns[number], check, check.by_length[fmt]) for number, check in checks if fmt in check.by_length]
