"""Which requests are steered and from which position on; and their KV, which is kept apart from everybody else's.

Keys and values of a row that was written to, or that follows one, must not be given to a request that is not steered
in the same way. What is steered is a function of the tokens alone only where every row of a request is written to:
then its blocks get a salt of their own, and requests with the same steers share them; so it is with a prompt whose own
rows say where steering begins. Where it begins at a position for another reason (the end of the prompt, or where a rule
fired in the reply), the blocks from there on belong to this request alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from monitor.compiled import CompiledPolicy
from monitor.gates import SteerGate
from monitor.generations import Generations
from monitor.monitor import Monitor, StepReadouts
from monitor.policy import Plan
from monitor.request import Request as Admitted
from monitor.types import Gap, Mode
from probes.steering.steer import Positions, Steer
from serving.engine.open_gates import OpenGate
from serving.engine.private_blocks import PrivateBlocks
from serving.engine.steer_order import STEERS, SteerOrder
from serving.engine.steered_request import SteeredRequest

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class SteerBook:
    """The steered requests of one engine.

    Args:
        plan: what may be written.
        block_size: tokens of what gets one hash in the prefix cache.
        ahead: whether steps are scheduled before the result of the one before is known.
    """

    def __init__(self, plan: Plan, *, block_size: int, ahead: bool = False) -> None:
        self._first = plan
        self._plan = plan.steering
        self._block_size = block_size
        self._ahead = ahead
        gates = plan.steering.gates
        self._columns = [gate.column for gate in gates]
        # What lies above none of these opens nothing, in whatever format it came.
        self._floors = np.array([gate.lowest_limit for gate in gates], dtype=np.float32)
        # Nobody can make the salt of steered blocks by sending one of his own.
        self._secret = os.urandom(16)
        self._live: dict[str, SteeredRequest] = {}

    def admit(
        self,
        request: Request,
        live: Admitted,
        policy: CompiledPolicy,
        asked: Mapping[str, float],
        plan: Plan | None = None,
    ) -> None:
        """A request has come. Its block hashes are made anew where its steers write to its prompt.

        Args:
            request: vLLM's, not scheduled yet.
            live: the monitor's.
            policy: that it is under.
            asked: what it asked for and may have: by a steer's name, the share of its strength.
            plan: that its policy is of; None for the first one. All have the same steers and places of gates.
        """
        under = plan or self._first
        rules = [
            rule
            for rule in policy.rules
            if rule.steer is not None
            and rule.mode is Mode.ENFORCE
            and rule.name not in live.outside
            # What stands against the request's session has acted already.
            and rule.conversation is None
        ]
        if not policy.steers and not rules and not asked and not live.steers:
            return
        steers, num_prompt = self._plan.steers, request.num_prompt_tokens
        scales = dict.fromkeys((*policy.steers, *sorted(live.steers)), 1.0)
        may_ask = (*policy.on_request, *policy.second_steers)
        scales |= {number: asked[steers[number].name] for number in may_ask if steers[number].name in asked}
        orders = [SteerOrder(number, *steers[number].span(num_prompt), scale) for number, scale in scales.items()]
        gates = [
            self._open(rule.gate, under.steering.gates[rule.gate], live) for rule in rules if rule.gate is not None
        ]
        state = SteeredRequest(orders, None, [gate for gate in gates if gate is not None])
        state.in_prompt = any(gate.writes[0] < num_prompt for gate in state.gates)
        inner = request._block_hasher
        if inner is not None:
            always = [(steers[number], scale) for number, scale in scales.items()]
            in_prompt = [(steer, scale) for steer, scale in always if steer.positions is not Positions.GENERATED]
            salted = bool(in_prompt) or state.in_prompt
            if salted:
                request.cache_salt = self._salt(request.cache_salt, in_prompt, state, under.digest)
                request.block_hashes.clear()
            # Where some rows are written to by their place in the request, its tokens do not say which; nor do those
            # of a reply where the same tokens, as a part of the next prompt, could open a gate.
            by_place = state.in_prompt or any(steer.positions is not Positions.ALL for steer, _ in always)
            if by_place or rules:
                state.blocks = PrivateBlocks(inner, self._block_size, num_prompt if by_place else None)
                request._block_hasher = state.blocks
            if salted:
                request.update_block_hashes()
        self._live[request.request_id] = state

    def needs_filed(self, request_id: str) -> bool:
        """Whether what was read of a cached prefix has to be known when the request is scheduled."""
        state = self._live.get(request_id)
        return state is not None and bool(state.gates) and (state.in_prompt or self._ahead)

    def gated(self, request_ids: Iterable[str]) -> list[str]:
        """Those of these requests whose rows may open a gate."""
        return [name for name in request_ids if name in self._live and self._live[name].gates]

    def replayed(self, request_id: str, readouts: npt.NDArray[np.float32]) -> None:
        """The rows of a cached prefix open gates as those that are computed do.

        Args:
            request_id: any.
            readouts: (n, width of the bank), positions 0 to n - 1.
        """
        if (state := self._live.get(request_id)) is not None:
            state.see(np.arange(len(readouts), dtype=np.int64), readouts)

    def seen(self, step: StepReadouts) -> None:
        """Rows that count have been read: what they have opened stands from now on."""
        if not self._columns:
            return
        # Asked once for all rows: nearly every step opens nothing, and then there is nothing to look for.
        may_open = bool((step.readouts[:, self._columns] > self._floors).any())
        for request_id, start, count in zip(step.request_ids, step.starts, step.counts, strict=True):
            state = self._live.get(request_id)
            if state is None or not state.gates or not count:
                continue
            if may_open:
                state.see(step.positions[start : start + count], step.readouts[start : start + count])
            else:
                state.pass_by(int(step.positions[start + count - 1]))

    def lost(self, request_ids: Iterable[str]) -> None:
        """The readouts of a step did not come."""
        for request_id in self.gated(request_ids):
            self._live[request_id].lose()

    def judged(self, request_ids: Sequence[str], monitor: Monitor | Generations) -> None:
        """Take over the steers that rules have switched on in this step.

        Args:
            request_ids: of the step.
            monitor: that has judged it.
        """
        for request_id in request_ids:
            state, live = self._live.get(request_id), monitor.get(request_id)
            if state is None or live is None or not live.steers - state.known():
                continue
            reached = monitor.positions_of(request_id)
            state.pending |= dict.fromkeys(live.steers - state.known(), reached)
            if state.blocks is not None:
                state.blocks.keep_from(reached)

    def scheduled(self, step: SchedulerOutput, requests: Mapping[str, Request]) -> None:
        """Tell the workers what to write in a step.

        A rule's steer begins with the first row that is computed after the rule has fired: where that is, is settled
        here once, so that a preempted request is computed again as it was.
        """
        orders = {}
        for request_id, count in step.num_scheduled_tokens.items():
            state = self._live.get(request_id)
            if state is None:
                continue
            found = state.ordered(requests[request_id].num_computed_tokens - count)
            if found:
                orders[request_id] = tuple(found)
        if orders:
            setattr(step, STEERS, orders)

    def tell(self, step: StepReadouts, doses: npt.NDArray[np.float32] | None, monitor: Monitor | Generations) -> None:
        """Tell the monitor how far rows were moved; those that should have been written to and were not are gaps.

        Args:
            step: as the monitor has observed it.
            doses: (n, steers) of its rows; None if the workers wrote nothing.
            monitor: of the engine.
        """
        if doses is not None and doses.shape != (len(step.positions), len(self._plan.steers)):
            doses = None
        for request_id, start, count in zip(step.request_ids, step.starts, step.counts, strict=True):
            state = self._live.get(request_id)
            if state is None or not count or not state.is_written:
                continue
            rows = slice(int(start), int(start + count))
            positions = step.positions[rows]
            fresh = positions >= state.told
            missed = np.zeros(len(positions), dtype=bool)
            sizes = {}
            for steer, written in state.due(positions, step.readouts[rows]).items():
                due = fresh & written
                if not due.any():
                    continue
                found = np.full(len(due), np.nan) if doses is None else doses[rows, steer].astype(np.float64)
                missed |= due & ~np.isfinite(found)
                sizes[steer] = found[due & np.isfinite(found)] / self._plan.steers[steer].unit
            state.told = max(state.told, int(positions[-1]) + 1)
            if not sizes:
                continue
            monitor.steered(request_id, sizes)
            if lost := int(np.count_nonzero(missed)):
                scored = monitor.scored_of([request_id])
                monitor.distrust({name: total - lost for name, total in scored.items()}, Gap.NOT_STEERED)

    @property
    def is_empty(self) -> bool:
        """Whether no live request is steered, or may be."""
        return not self._live

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._live.pop(request_id, None)

    def hold(self, plans: Iterable[Plan]) -> None:
        """These plans may have requests: what lies above none of their gates' limits opens nothing."""
        floors = [[gate.lowest_limit for gate in plan.steering.gates] for plan in plans]
        self._floors = np.array(floors, dtype=np.float32).min(axis=0) if self._columns else self._floors

    def _open(self, number: int, gate: SteerGate, live: Admitted) -> OpenGate | None:
        span = self._plan.steers[gate.steer].span(live.num_prompt)
        return OpenGate.of(number, gate, live.fmt, span, num_prompt=live.num_prompt, stream_from=live.stream_from)

    def _salt(self, own: str | None, steers: Sequence[tuple[Steer, float]], state: SteeredRequest, plan: str) -> str:
        """The salt of requests whose prompts are written to alike, and that have the same salt of their own."""
        opened = [
            [self._plan.steers[gate.gate.steer].digest(), gate.number, float(gate.limit), gate.reads[0]]
            for gate in state.gates
        ]
        # A column may hold another direction under another plan; a position among gates another gate.
        told = plan if opened else ""
        content = json.dumps([own, [[steer.digest(), scale] for steer, scale in steers], opened, told])
        return hashlib.sha256(content.encode() + self._secret).hexdigest()
