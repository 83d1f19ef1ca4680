"""The monitor: readouts of a step in, decisions about requests out. Knows no engine, no clock and no network."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt

from monitor.attempt import Attempt
from monitor.compiled import CompiledPolicy
from monitor.coverage import Coverage, close_account
from monitor.dose import Dose
from monitor.finite import finite_rows
from monitor.groups import group_checks
from monitor.judge import Judge
from monitor.policy import Plan
from monitor.request import Choices, Decision, Float64, Index, Request
from monitor.rollout import Subjects
from monitor.segments import PromptMap
from monitor.state import StateTable
from monitor.tally import Tally
from monitor.types import ON_UNCALIBRATED, Gap, Mode, Skip
from monitor.weighed import WeighedCheck
from probes.card import Format


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


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has ended: its account, its final statistics and what was decided."""

    request: Request
    coverage: Coverage
    statistics: Float64
    fired: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """R live requests.

    Attributes:
        scored, sink: (R,) positions.
        statistics: (R, checks) in the order of the plan.
        fired: (R, checks), likewise.
        decided: by the request's id every decision but allow.
    """

    scored: npt.NDArray[np.int64]
    sink: npt.NDArray[np.int64]
    statistics: Float64
    fired: npt.NDArray[np.bool_]
    decided: Mapping[str, Decision]


class Monitor:
    """Scores, aggregates and decides for all live requests of one engine.

    ``admit`` a request, feed it with ``observe`` step by step, ``finish`` it. A request's action only ever rises.

    Args:
        plan: what is checked, and which policies there are.
        rollout_key: secret that says, with a rule's name, whom it is enforced for.
    """

    def __init__(self, plan: Plan, *, rollout_key: bytes = b"") -> None:
        self._rollout_key = rollout_key
        self._live: dict[str, Request] = {}
        self._groups = group_checks(plan.checks, plan.bank)
        sums = {number: check for number, check in enumerate(plan.checks) if isinstance(check, WeighedCheck)}
        self._table = StateTable(self._groups, sums)
        self._slots: dict[str, int] = {}
        self._choices: dict[str, Choices] = {}
        self._used = plan.bank.used_columns()
        self._by_role = any(group.has_segments for group in self._groups)
        self._skip = max((check.skip_first for check in plan.checks), default=0)
        self._policies = {policy.name: number for number, policy in enumerate(plan.policies)}
        self._judge = Judge(plan, self._table)

    def admit(
        self,
        request_id: str,
        *,
        num_prompt: int,
        policy: str | None,
        fmt: Format,
        prompt: PromptMap | None = None,
        subjects: Subjects | None = None,
        attempt: Attempt = Attempt.UNHELD,
        refusal: tuple[str, str] | None = None,
        imposed: Collection[str] = (),
    ) -> Request:
        """Begin a request.

        Args:
            request_id: the engine's own id.
            num_prompt: prompt tokens.
            policy: its policy; the first one if None, the strictest one if unknown.
            fmt: how its text reached the model.
            prompt: what the front end says of its prompt. None if nobody who may say so said anything: it is counted,
                every rule reads everything, and streams are read from the first position on.
            subjects: whom it belongs to. None if nobody who may say so said anything: every rule is enforced.
            attempt: which one at an answer it is, and whether somebody withholds the reply.
            refusal: rule and text of a block that is decided already.
            imposed: names of the rules over conversations that stand against its session.
        """
        if request_id in self._live:
            raise ValueError(f"request {request_id!r} is live already; the engine's ids are unique")
        number = self._policies.get(policy, self.plan.strictest) if policy is not None else 0
        compiled = self.plan.policies[number]
        slot = self._table.take(*self._judge.limits(number, fmt), num_prompt, fmt)
        request = Request(
            request_id,
            slot,
            num_prompt,
            number,
            fmt,
            stream_from=min(prompt.stream_from, num_prompt) if prompt is not None else 0,
            roles=prompt.codes(num_prompt) if prompt is not None and self._by_role else None,
            events=prompt.events if prompt is not None else (),
            outside=compiled.outside(self._rollout_key, subjects) if subjects is not None else frozenset(),
            plan=self.plan.digest,
            tenant=subjects.tenant if subjects is not None else "",
            attempt=attempt,
        )
        if refusal is not None:
            self._judge.refuse(request, *refusal)
        self.tally.unsigned += prompt is None
        self.tally.events.update(request.events)
        self._live[request_id] = request
        self._slots[request_id] = slot
        self._judge.set_by_length(request)
        if subjects is not None and subjects.request and compiled.blocks_requests:
            self._choices.setdefault(subjects.request, Choices(subjects.request)).join(request)
        if self._judge.is_uncalibrated(request):
            self._judge.act(request, ON_UNCALIBRATED, compiled.on_uncalibrated, Mode.ENFORCE, compiled.text)
        self._judge.impose(request, imposed)
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
        finite = finite_rows(step.readouts, scores, self._used)
        request_ids = step.request_ids
        slots = np.fromiter(map(self._slots.get, request_ids, repeat(-1)), dtype=np.intp, count=len(request_ids))
        numbers = np.flatnonzero((slots >= 0) & (step.counts > 0))
        if len(numbers) == 0:
            return
        slots, starts = slots[numbers], step.starts[numbers]
        table = self._table
        first = step.positions[starts]
        quick = (
            (step.counts[numbers] == 1)
            & finite[starts]
            & (first == table.next_position[slots])
            & (first >= np.maximum(table.num_prompt[slots], self._skip))
        )
        if quick.all() and len(numbers) == len(scores):
            # Each row is a token of its own request: nothing has to be picked out.
            table.feed_tokens(slots, scores if bool((starts[1:] > starts[:-1]).all()) else scores[starts])
            self.tally.scored += len(slots)
        else:
            self._observe_mixed(step, scores, finite, numbers=numbers, quick=quick)
        self._judge.judge(self._live, request_ids, numbers, slots)

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
        self._observe_chunk(request, positions, scores, finite_rows(readouts, scores, self._used))

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
            lost.append(request_id)
            missing = position - int(self._table.next_position[request.slot])
            if missing > 0:
                self._table.next_position[request.slot] = position
                self._judge.gap(request, reason, missing)
        slots = np.array([self._slots[request_id] for request_id in lost], dtype=np.intp)
        self._judge.judge(self._live, lost, np.arange(len(lost)), slots)

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
                self._judge.gap(request, reason, doubtful)

    def steered(self, request_id: str, doses: Mapping[int, Float64]) -> None:
        """Rows of a live request have been written to.

        Args:
            request_id: others than live ones are ignored.
            doses: by the steer's position, (n,) sizes of the changes in units of its median norm, 0 for none.
        """
        request = self._live.get(request_id)
        if request is None:
            return
        for number, sizes in doses.items():
            dose = request.doses.setdefault(number, Dose())
            before = dose.tokens
            dose.add(sizes)
            self.tally.steered[self.plan.steering.steers[number].name] += dose.tokens - before

    @property
    def plan(self) -> Plan:
        """What is checked, and which policies there are."""
        return self._judge.plan

    @property
    def tally(self) -> Tally:
        """Counts since they were taken last."""
        return self._judge.tally

    def take_tally(self) -> Tally:
        """Counts since the call before."""
        return self._judge.take_tally()

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
        table, slot = self._table, self._slots.pop(request_id)
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
            self._judge.gap(request, Gap.UNSEEN, missing)
        self.tally.skipped[Skip.FINAL] += coverage.final
        self._judge.judge_end(request)
        statistics, fired = (table.in_plan_order(values[slot]) for values in (table.statistics, table.fired))
        ended = Ended(request, coverage, statistics, fired)
        table.release(slot)
        if request.choices is not None:
            request.choices.live.remove(request)
            if not request.choices.live:
                del self._choices[request.choices.name]
        return ended

    def snapshot(self, requests: Sequence[Request]) -> Snapshot:
        """Live requests as they are, in their order.

        Checks at the stage response are shown as if each reply ended here: where it does is not always known here.
        """
        table = self._table
        if not requests:  # most steps have nothing new to tell
            return Snapshot(table.scored[:0], table.sink[:0], table.statistics[:0], table.fired[:0], {})
        slots = np.array([request.slot for request in requests], dtype=np.intp)
        fired, decided = self._judge.if_ended(requests, slots)
        statistics = table.in_plan_order(table.of(table.statistics, slots))
        return Snapshot(table.scored[slots], table.sink[slots], statistics, table.in_plan_order(fired), decided)

    def _observe_mixed(
        self,
        step: StepReadouts,
        scores: Float64,
        finite: npt.NDArray[np.bool_],
        *,
        numbers: Index,
        quick: npt.NDArray[np.bool_],
    ) -> None:
        """A step of chunks of prompts and of single tokens, those at ``quick`` of the requests at ``numbers``."""
        single = numbers[quick]
        if len(single):
            slots = np.array([self._slots[step.request_ids[number]] for number in single], dtype=np.intp)
            self._table.feed_tokens(slots, scores[step.starts[single]])
            self.tally.scored += len(single)
        for number in numbers[~quick]:
            rows = slice(int(step.starts[number]), int(step.starts[number] + step.counts[number]))
            request = self._live[step.request_ids[number]]
            self._observe_chunk(request, step.positions[rows], scores[rows], finite[rows])

    def _observe_chunk(
        self, request: Request, positions: npt.NDArray[np.int64], scores: Float64, finite: npt.NDArray[np.bool_]
    ) -> None:
        table, slot = self._table, request.slot
        new = positions >= table.next_position[slot]
        if not new.any():
            return  # recomputed after a preemption: each position counts once
        if not new.all():
            positions, scores, finite = positions[new], scores[new], finite[new]
        unseen = int(positions[-1] + 1 - table.next_position[slot]) - len(positions)
        if unseen:
            self._judge.gap(request, Gap.UNSEEN, unseen)
        if broken := int(np.count_nonzero(~finite)):
            self._judge.gap(request, Gap.NOT_FINITE, broken)
        for group in self._groups:
            read = finite & group.reads(request, positions)
            if read.any():
                table.feed_chunk(slot, group, scores if read.all() else scores[read])
        sink = int(np.count_nonzero(finite & (positions < self._skip)))
        scored = int(np.count_nonzero(finite)) - sink
        table.sink[slot] += sink
        table.scored[slot] += scored
        table.next_position[slot] = positions[-1] + 1
        self.tally.scored += scored
        self.tally.skipped[Skip.SINK] += sink
