"""Flagged requests that are computed once more to explain them, where they are scheduled.

The API process asks: for the tokens of a flagged request (a blocked one's last tokens never leave the engine), and then
that it be computed again, once for what the taps read and once for whole rows. Such a request is ours, as sealed data
say, and no user's: the monitor does not know it, it reads no cached prefix, and nobody reads its blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serving.engine.pick_order import MAX_PICKS, PICKS

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from monitor.monitor import Ended
    from serving.engine.readouts import WorkerReadouts

_KEPT_RESULTS = 4
_MARGIN = 8
"""Requests that are kept beyond what an API process may have waiting: it hears of their end a moment later."""


@dataclass(frozen=True, slots=True)
class _Flagged:
    """A request that has ended, as far as it takes to read it again."""

    tokens: npt.NDArray[np.int32]
    num_prompt: int
    stream_from: int
    roles: npt.NDArray[np.uint8] | None

    def told(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens.tobytes(),
            "num_prompt": self.num_prompt,
            "stream_from": self.stream_from,
            "roles": self.roles.tobytes() if self.roles is not None else None,
        }


@dataclass(slots=True)
class _Live:
    """A request that is computed again."""

    positions: tuple[int, ...]
    readouts: npt.NDArray[np.float32]
    rows: dict[int, npt.NDArray[np.float32]]

    def told(self) -> dict[str, Any]:
        whole = [self.rows[position] for position in self.positions if position in self.rows]
        return {
            "readouts": self.readouts.tobytes(),
            "rows": np.stack(whole).tobytes() if whole and len(whole) == len(self.positions) else b"",
        }


class Rereads:
    """Of one engine.

    Args:
        keep: flagged requests that are kept for each API process until it asks for them; 0 where nobody explains.
        width: of the bank.
    """

    def __init__(self, *, keep: int, width: int) -> None:
        self._keep = keep + _MARGIN if keep else 0
        self._width = width
        self._flagged: dict[int, OrderedDict[str, _Flagged]] = {}
        self._live: dict[str, _Live] = {}
        self._done: OrderedDict[str, _Live] = OrderedDict()

    def ended(self, request: Request, ended: Ended | None) -> None:
        """A request has ended; of those on which something fired the newest are kept.

        Args:
            request: vLLM's.
            ended: the monitor's account; None if it did not know the request.
        """
        if not self._keep or ended is None or not (ended.request.decided or ended.fired.any()):
            return
        kept = self._flagged.setdefault(request.client_index, OrderedDict())
        tokens = np.array(request.all_token_ids, dtype=np.int32)
        kept[request.request_id] = _Flagged(
            tokens, request.num_prompt_tokens, ended.request.stream_from, ended.request.roles
        )
        while len(kept) > self._keep:
            kept.popitem(last=False)

    def take_flagged(self, request_id: str) -> dict[str, Any]:
        """The tokens of a flagged request, which is forgotten; empty if it is not known."""
        for kept in self._flagged.values():
            if request_id in kept:
                return kept.pop(request_id).told()
        return {}

    def admit(self, request_id: str, num_prompt: int, positions: Sequence[int]) -> None:
        """One is about to be computed again.

        Args:
            request_id: the engine's own.
            num_prompt: its tokens.
            positions: whose whole rows are wanted.
        """
        readouts = np.full((num_prompt, self._width), np.nan, dtype=np.float32)
        self._live[request_id] = _Live(tuple(positions), readouts, {})

    def scheduled(self, step: SchedulerOutput) -> None:
        """Tell the workers which rows of the next step are wanted."""
        if not self._live:
            return
        orders: dict[str, tuple[int, ...]] = {}
        room = MAX_PICKS
        for request_id in step.num_scheduled_tokens:
            live = self._live.get(request_id)
            # What finds no room is missing in the result, which says so.
            if live is not None and 0 < len(live.positions) <= room:
                orders[request_id] = live.positions
                room -= len(live.positions)
        if orders:
            setattr(step, PICKS, orders)

    def take(self, readouts: WorkerReadouts | None) -> None:
        """Look at a step's rows."""
        if not self._live or readouts is None:
            return
        start = 0
        for request_id, count in zip(readouts.request_ids, readouts.counts.tolist(), strict=True):
            rows = slice(start, start + count)
            start += count
            live = self._live.get(request_id)
            if live is not None:
                inside = readouts.positions[rows] < len(live.readouts)
                live.readouts[readouts.positions[rows][inside]] = readouts.readouts[rows][inside]
        if readouts.picked is not None:
            for (request_id, position), row in zip(readouts.picked.wanted, readouts.picked.rows, strict=True):
                live = self._live.get(request_id)
                if live is not None and np.isfinite(row).all():
                    live.rows[position] = row.copy()

    def finish(self, request_id: str) -> None:
        """A request has ended; others than these are ignored."""
        live = self._live.pop(request_id, None)
        if live is not None:
            self._done[request_id] = live
            while len(self._done) > _KEPT_RESULTS:
                self._done.popitem(last=False)

    def take_result(self, request_id: str) -> dict[str, Any]:
        """What came of one, which is forgotten: ``readouts`` of all its tokens and ``rows`` at the positions, float32.

        ``rows`` is empty where one is missing; the whole answer is where the request is not known.
        """
        live = self._done.pop(request_id, None)
        return live.told() if live is not None else {}
