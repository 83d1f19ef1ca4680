"""Which requests are steered and from which position on; and their KV, which is kept apart from everybody else's.

Keys and values of a row that was written to, or that follows one, must not be given to a request that is not steered
in the same way. What is steered is a function of the tokens alone only where every row of a request is written to:
then its blocks get a salt of their own, and requests with the same steers share them. Where steering begins at a
position (the end of the prompt, or where a rule fired), the blocks from there on belong to this request alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from monitor.monitor import Monitor, StepReadouts
from monitor.policy import CompiledPolicy, Plan
from monitor.types import Gap
from probes.steering.steer import END, Positions, Steer
from serving.engine.steer_order import STEERS, SteerOrder

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass(slots=True)
class PrivateBlocks:
    """Hashes of a request's KV blocks, those from some position on unlike anybody else's.

    Attributes:
        inner: vLLM's own, which hashes the full blocks that have no hash yet.
        block_size: tokens of what gets one hash.
        start: first position whose row differs from what its tokens say; None while there is none.
        secret: makes hashes differ.
    """

    inner: Callable[[Any], list[Any]]
    block_size: int
    start: int | None = None
    secret: bytes = field(default_factory=lambda: os.urandom(16))

    def __call__(self, request: Any) -> list[Any]:
        """Hashes of the full blocks that have none."""
        known = len(request.block_hashes)
        fresh = self.inner(request)
        if self.start is None:
            return fresh
        return [
            hashlib.sha256(found + self.secret).digest() if (number + 1) * self.block_size > self.start else found
            for number, found in enumerate(fresh, known)
        ]


@dataclass(slots=True)
class _Steered:
    """A live request that is steered, or may be.

    Attributes:
        orders: what is written to it.
        pending: steers that a rule has switched on since the request was last scheduled, each with the first position
            that was not judged then.
        blocks: its KV; None if it is shared.
        told: the first position whose dose was not told yet; rows that are computed again do not count twice.
    """

    orders: list[SteerOrder]
    blocks: PrivateBlocks | None
    pending: dict[int, int] = field(default_factory=dict)
    told: int = 0

    def known(self) -> set[int]:
        return {*self.pending, *(order.steer for order in self.orders)}


class SteerBook:
    """The steered requests of one engine.

    Args:
        plan: what may be written.
        block_size: tokens of what gets one hash in the prefix cache.
    """

    def __init__(self, plan: Plan, *, block_size: int) -> None:
        self._steers = plan.steering.steers
        self._block_size = block_size
        # Nobody can make the salt of steered blocks by sending one of his own.
        self._secret = os.urandom(16)
        self._live: dict[str, _Steered] = {}

    def admit(self, request: Request, policy: CompiledPolicy, asked: Mapping[str, float]) -> None:
        """A request has come. Its block hashes are made anew where its steers write to its prompt.

        Args:
            request: not scheduled yet.
            policy: that it is under.
            asked: what it asked for and may have: by a steer's name, the share of its strength.
        """
        by_rule = any(rule.steer is not None for rule in policy.rules)
        if not policy.steers and not by_rule and not asked:
            return
        scales = dict.fromkeys(policy.steers, 1.0)
        scales |= {
            number: asked[self._steers[number].name]
            for number in policy.on_request
            if self._steers[number].name in asked
        }
        always = [(self._steers[number], scale) for number, scale in scales.items()]
        orders = [
            SteerOrder(number, *self._steers[number].span(request.num_prompt_tokens), scale)
            for number, scale in scales.items()
        ]
        blocks = None
        inner = request._block_hasher
        if inner is not None:
            in_prompt = [(steer, scale) for steer, scale in always if steer.positions is not Positions.GENERATED]
            if in_prompt:
                request.cache_salt = _salt(request.cache_salt, in_prompt, self._secret)
                request.block_hashes.clear()
            # Where some rows are written to by their place in the request, its tokens do not say which.
            by_place = any(steer.positions is not Positions.ALL for steer, _ in always)
            if by_place or by_rule:
                blocks = PrivateBlocks(inner, self._block_size, request.num_prompt_tokens if by_place else None)
                request._block_hasher = blocks
            if in_prompt:
                request.update_block_hashes()
        self._live[request.request_id] = _Steered(orders, blocks)

    def judged(self, request_ids: Sequence[str], monitor: Monitor) -> None:
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
                state.blocks.start = reached if state.blocks.start is None else min(state.blocks.start, reached)

    def scheduled(self, step: SchedulerOutput, requests: Mapping[str, Request]) -> None:
        """Tell the workers what to write in a step.

        A rule's steer begins with the first row that is computed after the rule has fired: where that is, is settled
        here once, so that a preempted request is computed again as it was.
        """
        if not self._live:
            return
        orders = {}
        for request_id, count in step.num_scheduled_tokens.items():
            state = self._live.get(request_id)
            if state is None:
                continue
            if state.pending:
                first = requests[request_id].num_computed_tokens - count
                # What was judged before is computed again as it was, should the request have been preempted meanwhile.
                state.orders += [
                    SteerOrder(steer, max(first, reached), END) for steer, reached in sorted(state.pending.items())
                ]
                state.pending = {}
            if state.orders:
                orders[request_id] = tuple(state.orders)
        if orders:
            setattr(step, STEERS, orders)

    def tell(self, step: StepReadouts, doses: npt.NDArray[np.float32] | None, monitor: Monitor) -> None:
        """Tell the monitor how far rows were moved; those that should have been written to and were not are gaps.

        Args:
            step: as the monitor has observed it.
            doses: (n, steers) of its rows; None if the workers wrote nothing.
            monitor: of the engine.
        """
        if doses is not None and doses.shape != (len(step.positions), len(self._steers)):
            doses = None
        for request_id, start, count in zip(step.request_ids, step.starts, step.counts, strict=True):
            state = self._live.get(request_id)
            if state is None or not state.orders or not count:
                continue
            rows = np.arange(start, start + count)
            positions = step.positions[rows]
            fresh = positions >= state.told
            state.told = max(state.told, int(positions[-1]) + 1)
            missed = np.zeros(len(rows), dtype=bool)
            sizes = {}
            for order in state.orders:
                due = fresh & (positions >= order.start) & (positions < order.stop)
                if not due.any():
                    continue
                found = np.full(len(rows), np.nan) if doses is None else doses[rows, order.steer].astype(np.float64)
                missed |= due & ~np.isfinite(found)
                sizes[order.steer] = found[due & np.isfinite(found)] / self._steers[order.steer].unit
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


def _salt(own: str | None, steers: Sequence[tuple[Steer, float]], secret: bytes) -> str:
    """The salt of requests whose prompts these steers write to, and that have the same salt of their own."""
    content = json.dumps([own, [[steer.digest(), scale] for steer, scale in steers]])
    return hashlib.sha256(content.encode() + secret).hexdigest()
