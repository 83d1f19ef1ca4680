"""What the API process knows of each request: one shared record, joined by the engine's own request id."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from monitor.attempt import Attempt
from monitor.compiled import CompiledPolicy, CompiledRule
from monitor.condition import Condition, Truth
from monitor.policy import Plan
from monitor.report import Decided, EndedReport, Steered, StepReport, Trail
from monitor.rule import Scope
from monitor.types import ActionCode, Expose, Skip
from probes.card import Format


class Record:
    """One request. Every output that vLLM makes for it points here, so that merged outputs lose nothing.

    Attributes:
        plan: that it is under.
        ended: the engine has said so.
        counted: it is a user's, and not our own way of saying what is decided.
        withheld: somebody waits to carry out what is decided; else what cannot be carried out any more is a block.
        entered: its end has been entered into the audit trail.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.policy = 0
        self.fmt = Format.RAW
        self.scored = 0
        self.skipped: dict[str, int] = {}
        self.statistics: list[float] = []
        self.fired: list[bool] = []
        self.decided: Decided | None = None
        self.events: list[str] = []
        self.steered: list[Steered] = []
        self.trail: Trail | None = None
        self.ended = False
        self.counted = True
        self.withheld = False
        self.entered = False
        self.num_positions = 0

    @property
    def blocked_text(self) -> str | None:
        """The refusal, if the request was blocked, or if what was decided would have to be done by somebody else."""
        if self.decided is None or self.decided.action < ActionCode.ESCALATE:
            return None
        if self.decided.action != ActionCode.BLOCK and self.withheld and not self.is_cut:
            return None
        return self.decided.text

    @property
    def rule(self) -> CompiledRule | None:
        """What decided it; None if nothing did, or none of the policy's rules."""
        rules = self.plan.policies[self.policy].rules
        named = self.decided.rule if self.decided is not None else None
        return next((rule for rule in rules if rule.name == named), None)

    @property
    def is_cut(self) -> bool:
        """Whether the engine ended it because its reply would be of no use."""
        return self.rule is not None and self.rule.ends(Attempt.FIRST)

    def truth(self, condition: Condition) -> Truth:
        """What is known of a condition over the plan's checks, now that the reply has ended."""

        def known(number: int) -> Truth:
            if number < len(self.fired) and self.fired[number]:
                return True
            return False if self.fmt in self.plan.checks[number].thresholds else None

        return condition.truth(known)

    @property
    def blocks_request(self) -> bool:
        """Whether it was blocked by a rule that blocks all choices of a request."""
        if self.blocked_text is None or self.decided is None:
            return False
        rules = self.plan.policies[self.policy].rules
        return any(rule.name == self.decided.rule and rule.scope is Scope.REQUEST for rule in rules)

    def statistic(self, number: int) -> tuple[str, float]:
        """Of a check, by its position in the plan: what it reads, and its statistic; NaN if there is none."""
        check = self.plan.checks[number]
        return check.detector, self.statistics[number] if self.statistics else math.nan

    @property
    def policy_name(self) -> str:
        """The policy that it is under."""
        return self.plan.policies[self.policy].name

    def close(self, num_positions: int) -> None:
        """The reply has been made with so many tokens in all, the engine may not have said so yet (stop strings)."""
        self.num_positions = num_positions

    def describe(self) -> dict[str, Any]:
        """The ``telltale`` object of a choice."""
        policy = self.plan.policies[self.policy]
        decided = self.decided
        described: dict[str, Any] = {
            "action": ActionCode(decided.action).action.value if decided is not None else "allow",
            "rule": decided.rule if decided is not None else None,
        }
        if self.events:
            described["events"] = list(self.events)
        if self.steered:
            described["steered"] = [self._describe_steered(steered) for steered in self.steered]
        skipped = self.account()
        described["detectors"] = [self._describe_check(position, policy, skipped) for position in policy.told]
        return described

    def _describe_check(self, position: int, policy: CompiledPolicy, skipped: dict[str, int]) -> dict[str, Any]:
        check = self.plan.checks[position]
        described: dict[str, Any] = {
            "name": check.detector,
            "stage": check.stage.value,
            **({"segments": [role.value for role in check.segments]} if check.segments is not None else {}),
            "fired": bool(self.fired[position]) if self.fired else False,
            "scored": self.scored,
            "skipped": dict(skipped),
        }
        if policy.expose is Expose.SCORES:
            statistic = _coarse(self.statistics[position] if self.statistics else -math.inf, policy.quantise)
            threshold = check.thresholds.get(self.fmt)
            described["score"] = round(statistic, 4) if math.isfinite(statistic) else None
            probability = self.plan.probability(position, self.fmt, statistic) if math.isfinite(statistic) else None
            if probability is not None:
                described["probability"] = round(probability, 4)
            described["threshold"] = round(threshold, 4) if threshold is not None else None
            if limits := check.by_length.get(self.fmt):
                ends = [*limits.ends, None]
                described["thresholds_by_length"] = [
                    {"max_tokens": end, "threshold": round(value, 4)}
                    for end, value in zip(ends, limits.values, strict=True)
                ]
        return described

    def _describe_steered(self, steered: Steered) -> dict[str, Any]:
        dose = {"mean": round(steered.mean, 4), "max": round(steered.largest, 4)}
        return {"name": self.plan.steering.steers[steered.steer].name, "tokens": steered.tokens, "dose": dose}

    def account(self) -> dict[str, int]:
        """Positions that were not scored, by reason: skipped rightly, or gaps."""
        skipped = dict(self.skipped)
        open_positions = self.num_positions - self.scored - sum(skipped.values())
        if not self.ended and open_positions > 0:
            # A reply that the API process ended (a stop string): its last token was not fed back.
            skipped[Skip.FINAL.value] = 1
        return skipped


def _coarse(statistic: float, step: float) -> float:
    """A statistic as far as a client may know it: whoever sees small differences can climb along them."""
    return round(statistic / step) * step if step and math.isfinite(statistic) else statistic


class Records:
    """All records of an API process.

    Args:
        plan: what the engine runs on.
    """

    def __init__(self, plan: Plan) -> None:
        self._plans = {plan.digest: plan}
        self._records: dict[str, Record] = {}
        self._leaving: list[str] = []

    def hold(self, plans: Mapping[str, Plan]) -> None:
        """Which plans reports may speak of from now on, by their digests."""
        self._plans = dict(plans)

    def take_in(self, *reports: StepReport) -> dict[str, Record]:
        """Update the records of a step.

        Records of ended requests stay until the next step: their last output comes behind the one that ends them.

        Args:
            reports: of one step, one for each plan.
        Returns: those that leave now, by their ids.
        Raises:
            KeyError: a report speaks of a plan that is not held.
        """
        left = {name: self._records.pop(name) for name in self._leaving if name in self._records}
        self._leaving = [ended.request_id for report in reports for ended in report.ended]
        for report in reports:
            self._take(report, self._plans[report.plan])
        return left

    def _take(self, report: StepReport, plan: Plan) -> None:
        for ended in report.ended:
            self._end(ended, plan)
        if not report.request_ids:
            return
        count = len(report.request_ids)
        scored = np.frombuffer(report.scored, dtype=np.int64)
        sink = np.frombuffer(report.sink, dtype=np.int64)
        statistics = np.frombuffer(report.statistics, dtype=np.float32).reshape(-1, count).T.tolist()
        fired = np.frombuffer(report.fired, dtype=np.bool_).reshape(-1, count).T.tolist()
        for row, request_id in enumerate(report.request_ids):
            record = self._record(request_id, plan)
            record.policy, record.fmt = report.policies[row], Format(report.formats[row])
            record.scored = int(scored[row])
            record.skipped = dict(report.gaps.get(request_id, ()))
            if sink[row]:
                record.skipped[Skip.SINK.value] = int(sink[row])
            record.statistics = statistics[row]
            record.fired = fired[row]
            record.decided = report.decided.get(request_id)
            record.events = report.events.get(request_id, [])
            record.steered = report.steered.get(request_id, [])
            record.trail = report.trails.get(request_id)

    def take_all(self) -> dict[str, Record]:
        """Every record that is left, by its id; nobody will hear more of them."""
        left, self._records = self._records, {}
        return left

    def get(self, request_id: str) -> Record | None:
        """The record of a request that the engine has reported on."""
        return self._records.get(request_id)

    def _record(self, request_id: str, plan: Plan) -> Record:
        if request_id not in self._records:
            self._records[request_id] = Record(plan)
        return self._records[request_id]

    def _end(self, ended: EndedReport, plan: Plan) -> None:
        record = self._record(ended.request_id, plan)
        record.policy, record.fmt = ended.policy, Format(ended.fmt)
        record.scored, record.skipped = ended.scored, ended.skipped
        record.statistics, record.fired = ended.statistics, ended.fired
        record.decided = ended.decided
        record.events = ended.events
        record.steered = ended.steered
        record.trail = ended.trail
        record.counted = ended.counted
        record.ended = True
