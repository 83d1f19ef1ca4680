"""The monitor: readouts of a step in, decisions about requests out. Knows no engine, no clock and no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from monitor.coverage import Coverage, close_account
from monitor.policy import CompiledPolicy, Plan
from monitor.segments import PromptMap
from monitor.state import Float64, Index, Request, StateTable, group_checks
from monitor.types import ON_GAP, ON_UNCALIBRATED, Action, ActionCode, Gap, Mode, PromptEvent, Skip
from probes.card import Format, Stage


@dataclass(frozen=True, slots=True)
class StepReadouts:
    """What one engine step read.

    Attributes:
        request_ids: in the order of the rows.
        counts: (R,) rows of each request that count; rejected draft rows are already left out.
        starts: (R,) each request's first row.
        positions: (n,) absolute token positions.
        readouts: (n, width of the bank) float32.
    """

    request_ids: Sequence[str]
    counts: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    readouts: npt.NDArray[np.float32]


@dataclass(slots=True)
class Tally:
    """What happened since the last report, for metrics.

    Attributes:
        scored: positions.
        skipped: positions by reason.
        gaps: positions by reason.
        acted: how often (rule, action, mode) acted or, in shadow, would have.
        events: requests with something noteworthy in their prompt.
        unsigned: requests that came without our front end's data.
    """

    scored: int = 0
    skipped: Counter[Skip] = field(default_factory=Counter)
    gaps: Counter[Gap] = field(default_factory=Counter)
    acted: Counter[tuple[str, Action, Mode]] = field(default_factory=Counter)
    events: Counter[PromptEvent] = field(default_factory=Counter)
    unsigned: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has ended: its account, its final statistics and what was decided."""

    request: Request
    coverage: Coverage
    statistics: Float64
    fired: npt.NDArray[np.bool_]


class Monitor:
    """Scores, aggregates and decides for all live requests of one engine.

    ``admit`` a request, feed it with ``observe`` step by step, ``finish`` it. A request's action only ever rises.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tally = Tally()
        self._live: dict[str, Request] = {}
        self._groups = group_checks(plan.checks, plan.bank)
        self._table = StateTable(self._groups, len(plan.checks))
        self._used = plan.bank.used_columns()
        self._by_role = any(group.has_segments for group in self._groups)
        self._at_end = np.array([check.stage is Stage.RESPONSE for check in plan.checks], dtype=bool)
        self._skip = max((check.skip_first for check in plan.checks), default=0)
        self._policies = {policy.name: number for number, policy in enumerate(plan.policies)}
        self._thresholds = {
            (number, fmt): self._threshold_row(policy, fmt)
            for number, policy in enumerate(plan.policies)
            for fmt in Format
        }

    def admit(
        self, request_id: str, *, num_prompt: int, policy: str | None, fmt: Format, prompt: PromptMap | None = None
    ) -> Request:
        """Begin a request.

        Args:
            request_id: the engine's own id.
            num_prompt: prompt tokens.
            policy: its policy; the first one if None or unknown.
            fmt: how its text reached the model.
            prompt: what the front end says of its prompt. None if nobody who may say so said anything: it is counted,
                every rule reads everything, and streams are read from the first position on.
        """
        if request_id in self._live:
            raise ValueError(f"request {request_id!r} is live already; the engine's ids are unique")
        number = self._policies.get(policy or "", 0)
        compiled = self.plan.policies[number]
        slot = self._table.take(self._thresholds[number, fmt], num_prompt)
        request = Request(
            request_id,
            slot,
            num_prompt,
            number,
            fmt,
            stream_from=min(prompt.stream_from, num_prompt) if prompt is not None else 0,
            roles=prompt.codes(num_prompt) if prompt is not None and self._by_role else None,
            events=prompt.events if prompt is not None else (),
        )
        self.tally.unsigned += prompt is None
        self.tally.events.update(request.events)
        self._live[request_id] = request
        if compiled.uncalibrated(self.plan.checks, fmt):
            self._act(request, ON_UNCALIBRATED, compiled.on_uncalibrated, Mode.ENFORCE, compiled.text)
        return request

    def get(self, request_id: str) -> Request | None:
        """A live request."""
        return self._live.get(request_id)

    def positions_of(self, request_id: str) -> int:
        """How many positions of a live request are accounted for; 0 for any other."""
        request = self._live.get(request_id)
        return int(self._table.next_position[request.slot]) if request is not None else 0

    def policy_of(self, request: Request) -> CompiledPolicy:
        """The policy that a request began with."""
        return self.plan.policies[request.policy]

    def observe(self, step: StepReadouts) -> None:
        """Take in one step: score every row, feed the aggregates, judge.

        Raises:
            ValueError: the readouts have another shape than the bank; the caller turns it into gaps.
        """
        if step.readouts.shape != (len(step.positions), self.plan.bank.width):
            raise ValueError(
                f"readouts have the shape {step.readouts.shape}; {len(step.positions)} rows of "
                f"{self.plan.bank.width} were expected"
            )
        scores = self.plan.bank.score(step.readouts)
        finite = self._finite(step.readouts, scores)
        requests = [self._live.get(request_id) for request_id in step.request_ids]
        known = np.array([request is not None for request in requests], dtype=bool) & (step.counts > 0)
        slots = np.array([request.slot if request is not None else 0 for request in requests], dtype=np.intp)
        first = step.positions[np.where(known, step.starts, 0)] if len(step.positions) else step.starts
        table = self._table
        quick = (
            known
            & (step.counts == 1)
            & (first == table.next_position[slots])
            & (first >= np.maximum(table.num_prompt[slots], self._skip))
        )
        quick[known] &= finite[step.starts[known]]
        if quick.any():
            self._observe_decoding(slots[quick], scores[step.starts[quick]])
        for number in np.flatnonzero(known & ~quick):
            request = requests[number]
            if request is None:  # pragma: no cover - known says that it is there
                continue
            rows = slice(int(step.starts[number]), int(step.starts[number] + step.counts[number]))
            self._observe_chunk(request, step.positions[rows], scores[rows], finite[rows])
        self._judge([request for request, is_known in zip(requests, known, strict=True) if request and is_known])

    def replay(self, request_id: str, readouts: npt.NDArray[np.float32]) -> None:
        """Take in the rows of a cached prefix: they feed aggregates like computed ones, and count once like them.

        Args:
            request_id: a live request; others are ignored.
            readouts: (n, width of the bank), positions 0 to n - 1.
        """
        request = self._live.get(request_id)
        if request is None or len(readouts) == 0:
            return
        scores = self.plan.bank.score(readouts)
        positions = np.arange(len(readouts), dtype=np.int64)
        self._observe_chunk(request, positions, scores, self._finite(readouts, scores))

    def lose(self, reached: Mapping[str, int], reason: Gap) -> None:
        """The rows of a step cannot be scored: count what is missing as a gap and act on it.

        Args:
            reached: per request, the position after its last row of the step.
            reason: why.
        """
        lost = []
        for request_id, position in reached.items():
            request = self._live.get(request_id)
            if request is None:
                continue
            lost.append(request)
            missing = position - int(self._table.next_position[request.slot])
            if missing > 0:
                self._table.next_position[request.slot] = position
                self._gap(request, reason, missing)
        self._judge(lost)

    def scored_of(self, request_ids: Sequence[str]) -> dict[str, int]:
        """Scored positions of those that are live, for ``distrust``."""
        live = [(request_id, self._live[request_id]) for request_id in request_ids if request_id in self._live]
        return {request_id: int(self._table.scored[request.slot]) for request_id, request in live}

    def distrust(self, before: Mapping[str, int], reason: Gap) -> None:
        """What was scored since ``before`` does not count as scored: it is a gap, and acts as one.

        Rules have acted on it all the same: a reading that may be wrong is no reason to let go what looks bad.

        Args:
            before: what ``scored_of`` gave.
            reason: why the readings are not to be trusted.
        """
        for request_id, scored in before.items():
            request = self._live.get(request_id)
            if request is None:
                continue
            doubtful = int(self._table.scored[request.slot]) - scored
            if doubtful > 0:
                self._table.scored[request.slot] = scored
                self.tally.scored -= doubtful
                self._gap(request, reason, doubtful)

    def take_tally(self) -> Tally:
        """Counts since the call before."""
        tally, self.tally = self.tally, Tally()
        return tally

    def finish(self, request_id: str, *, num_positions: int, sampled: int, aborted: bool) -> Ended | None:
        """End a request.

        Args:
            request_id: the engine's own id.
            num_positions: its tokens, prompt and generated.
            sampled: generated ones.
            aborted: it was cut off from outside; positions that were never computed are then nobody's gap.
        Returns: its account, or None if it is not known.
        """
        request = self._live.pop(request_id, None)
        if request is None:
            return None
        table, slot = self._table, request.slot
        seen = int(table.next_position[slot])
        before = sum(request.gaps.values())
        coverage = close_account(
            next_position=seen,
            scored=int(table.scored[slot]),
            sink=int(table.sink[slot]),
            gaps=request.gaps,
            num_positions=min(num_positions, seen + (1 if sampled else 0)) if aborted else num_positions,
            sampled=sampled,
        )
        missing = sum(coverage.gaps.values()) - before
        if missing:
            self._gap(request, Gap.UNSEEN, missing)
        self.tally.skipped[Skip.FINAL] += coverage.final
        for check in np.flatnonzero(self._above_at_end(slot)):
            table.fired[slot, check] = True
            self._fire(request, int(check))
        ended = Ended(request, coverage, table.statistics[slot].copy(), table.fired[slot].copy())
        table.release(slot)
        return ended

    def snapshot(self, requests: Sequence[Request]) -> tuple[Index, Index, Float64, npt.NDArray[np.bool_]]:
        """Scored positions, sink positions, statistics and fired checks of live requests, in their order.

        Checks at the stage response are shown as if each reply ended here: where it does is not always known here.
        """
        slots = np.array([request.slot for request in requests], dtype=np.intp)
        table = self._table
        fired = table.fired[slots]
        if self._at_end.any():
            fired |= self._above_at_end(slots)
        return table.scored[slots], table.sink[slots], table.statistics[slots], fired

    def decision_if_ended(self, request: Request) -> tuple[ActionCode, str, str]:
        """Action, rule and refusal of a live request, as if its reply ended here."""
        decided = request.action, request.rule, request.text
        if self._at_end.any():
            for check in np.flatnonzero(self._above_at_end(request.slot)):
                for rule in self.policy_of(request).rules:
                    code = ActionCode(rule.action.severity)
                    if rule.check == check and rule.mode is Mode.ENFORCE and code > decided[0]:
                        decided = code, rule.name, rule.text
        return decided

    def _observe_decoding(self, slots: Index, scores: Float64) -> None:
        table = self._table
        for group in self._groups:
            if group.stage is Stage.PROMPT:
                continue
            running = group.feed(slots, scores[None])[0]
            place = np.ix_(slots, group.checks)
            if group.stage is Stage.STREAM:
                running = np.maximum(table.statistics[place], running)
            table.statistics[place] = running
        table.next_position[slots] += 1
        table.scored[slots] += 1
        self.tally.scored += len(slots)

    def _observe_chunk(
        self, request: Request, positions: npt.NDArray[np.int64], scores: Float64, finite: npt.NDArray[np.bool_]
    ) -> None:
        table, slot = self._table, request.slot
        new = positions >= table.next_position[slot]
        if not new.any():
            return  # recomputed after a preemption: each position counts once
        positions, scores, finite = positions[new], scores[new], finite[new]
        unseen = int(positions[-1] + 1 - table.next_position[slot]) - len(positions)
        if unseen:
            self._gap(request, Gap.UNSEEN, unseen)
        if broken := int(np.count_nonzero(~finite)):
            self._gap(request, Gap.NOT_FINITE, broken)
        for group in self._groups:
            rows = scores[finite & group.reads(request, positions)]
            if len(rows) == 0:
                continue
            running = group.feed(np.array([slot], dtype=np.intp), rows[:, None])[:, 0]
            newest = running[-1]
            if group.stage is Stage.STREAM:
                newest = np.maximum(table.statistics[slot, group.checks], running.max(axis=0))
            table.statistics[slot, group.checks] = newest
        sink = int(np.count_nonzero(finite & (positions < self._skip)))
        scored = int(np.count_nonzero(finite)) - sink
        table.sink[slot] += sink
        table.scored[slot] += scored
        table.next_position[slot] = positions[-1] + 1
        self.tally.scored += scored
        self.tally.skipped[Skip.SINK] += sink

    def _judge(self, requests: Sequence[Request]) -> None:
        table = self._table
        slots = np.array([request.slot for request in requests], dtype=np.intp)
        complete = table.next_position[slots] >= table.num_prompt[slots]
        # NaN thresholds (not calibrated) and -inf statistics (undefined) compare as false. Nothing is judged before the
        # prompt is complete: which of two rules decides must not depend on how a prompt was cut into chunks.
        above = table.statistics[slots] > table.thresholds[slots]
        new = above & complete[:, None] & ~table.fired[slots] & ~self._at_end
        if not new.any():
            return
        table.fired[slots] |= new
        for number, check in zip(*np.nonzero(new), strict=True):
            self._fire(requests[number], int(check))

    def _above_at_end(self, slots: Index | int) -> npt.NDArray[np.bool_]:
        return np.asarray((self._table.statistics[slots] > self._table.thresholds[slots]) & self._at_end)

    def _fire(self, request: Request, check: int) -> None:
        for rule in self.policy_of(request).rules:
            if rule.check == check:
                self._act(request, rule.name, rule.action, rule.mode, rule.text)

    def _gap(self, request: Request, reason: Gap, count: int) -> None:
        request.gaps[reason] += count
        self.tally.gaps[reason] += count
        policy = self.policy_of(request)
        self._act(request, ON_GAP, policy.on_gap, Mode.ENFORCE, policy.text)

    def _act(self, request: Request, rule: str, action: Action, mode: Mode, text: str) -> None:
        if rule in request.decided:
            return
        request.decided.add(rule)
        self.tally.acted[rule, action, mode] += 1
        if mode is Mode.ENFORCE:
            request.raise_to(action, rule, text)

    def _finite(self, readouts: npt.NDArray[np.float32], scores: Float64) -> npt.NDArray[np.bool_]:
        return np.asarray(np.isfinite(readouts[:, self._used]).all(axis=1) & np.isfinite(scores).all(axis=1))

    def _threshold_row(self, policy: CompiledPolicy, fmt: Format) -> Float64:
        row = np.full(len(self.plan.checks), np.nan)
        for check in policy.checks:
            thresholds: Mapping[Format, float] = self.plan.checks[check].thresholds
            row[check] = thresholds.get(fmt, np.nan)
        return row


def is_blocked(request: Request | None) -> bool:
    """Whether a request is to be stopped."""
    return request is not None and request.action is ActionCode.BLOCK
