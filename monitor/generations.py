"""Several plans side by side: each request keeps the one that it began with, whatever is loaded meanwhile.

A generation is a plan and the monitor that judges by it. Requests of one never meet those of another: a step is handed
to each with the rows of its own requests alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from monitor.compiled import CompiledPolicy
from monitor.monitor import Ended, Monitor, StepReadouts
from monitor.policy import Plan
from monitor.request import Float64, Request
from monitor.tally import Tally
from monitor.types import Gap

GRACE_SECONDS = 10.0
"""How long a plan that was replaced is kept without requests: some that were signed under it may be on their way."""


class Generations:
    """All monitors of one engine.

    Args:
        plan: the first one.
        rollout_key: gives the secret that says, with a rule's name, whom it is enforced for.
        clock: seconds that only rise.
    """

    def __init__(
        self, plan: Plan, *, rollout_key: Callable[[], bytes] = bytes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rollout_key = rollout_key
        self._clock = clock
        self._monitors: dict[str, Monitor] = {}
        self._of: dict[str, Monitor] = {}
        self._replaced: dict[str, float] = {}
        self._left = Tally()
        self.add(plan)
        self._current = self._monitors[plan.digest]

    def add(self, plan: Plan) -> None:
        """A plan that requests may begin with from now on. One that is there already stays as it is."""
        if plan.digest not in self._monitors:
            key = self._rollout_key() if plan.is_rolled_out else b""
            self._monitors[plan.digest] = Monitor(plan, rollout_key=key)
        self._replaced.pop(plan.digest, None)

    def commit(self, digest: str) -> None:
        """From now on this one is what requests get for which nobody vouches; the others are only kept.

        Raises:
            KeyError: it was not added.
        """
        self._current = self._monitors[digest]
        self._replaced.pop(digest, None)
        for name in self._monitors:
            if name != digest:
                self._replaced.setdefault(name, self._clock())

    def discard(self, digest: str) -> None:
        """A plan that was added is not wanted after all. One that has requests, or is current, stays."""
        monitor = self._monitors.get(digest)
        if monitor is not None and monitor is not self._current and not self._has_requests(monitor):
            self._forget(digest)

    def release(self) -> None:
        """Forget the plans that were replaced some time ago and have no request left."""
        for name, since in list(self._replaced.items()):
            if not self._has_requests(self._monitors[name]) and self._clock() - since >= GRACE_SECONDS:
                self._forget(name)

    @property
    def plan(self) -> Plan:
        """What new requests get."""
        return self._current.plan

    @property
    def plans(self) -> Mapping[str, Plan]:
        """All that are kept, by their digests."""
        return {name: monitor.plan for name, monitor in self._monitors.items()}

    def monitor_of(self, digest: str | None) -> Monitor:
        """The monitor of a plan; the current one where nobody names one, or it has gone together with its requests."""
        return self._monitors.get(digest or "", self._current)

    def keep(self, request: Request) -> Request:
        """A request that the monitor of its plan has just admitted: from now on it is found here."""
        self._of[request.request_id] = self._monitors[request.plan]
        return request

    def get(self, request_id: str) -> Request | None:
        """A live request."""
        monitor = self._of.get(request_id)
        return monitor.get(request_id) if monitor is not None else None

    def plan_of(self, request_id: str) -> Plan:
        """The plan that a live request began with; the current one for any other."""
        return self._of.get(request_id, self._current).plan

    def positions_of(self, request_id: str) -> int:
        """How many positions of a live request are accounted for; 0 for any other."""
        monitor = self._of.get(request_id)
        return monitor.positions_of(request_id) if monitor is not None else 0

    def policy_of(self, request: Request) -> CompiledPolicy:
        """The policy that a request began with."""
        return self._monitors[request.plan].policy_of(request)

    def observe(self, step: StepReadouts) -> None:
        """Take in one step, see ``Monitor.observe``.

        Rows that one monitor has taken in before another one failed are not taken in twice: each position counts once.

        Raises:
            ValueError: the readouts have another shape than the banks.
        """
        for monitor, part in self.parts(step):
            monitor.observe(part)

    def parts(self, step: StepReadouts) -> list[tuple[Monitor, StepReadouts]]:
        """A step, taken apart by whose requests are in it. Rows of no request of ours are anybody's."""
        if len(self._monitors) == 1:  # nearly always
            return [(self._current, step)]
        monitors = self._among(step.request_ids)
        if len(monitors) <= 1:
            return [(monitors[0] if monitors else self._current, step)]
        return [
            (monitor, part_of(step, [name for name in step.request_ids if self._of.get(name) is monitor]))
            for monitor in monitors
        ]

    def replay(self, request_id: str, readouts: npt.NDArray[np.float32]) -> None:
        """Take in the rows of a cached prefix, see ``Monitor.replay``."""
        monitor = self._of.get(request_id)
        if monitor is not None:
            monitor.replay(request_id, readouts)

    def lose(self, reached: Mapping[str, int], reason: Gap) -> None:
        """The rows of a step cannot be scored, see ``Monitor.lose``."""
        for monitor in self._among(reached):
            monitor.lose(reached, reason)

    def scored_of(self, request_ids: Sequence[str]) -> dict[str, int]:
        """Scored positions of those that are live, for ``distrust``."""
        found: dict[str, int] = {}
        for monitor in self._among(request_ids):
            found |= monitor.scored_of(request_ids)
        return found

    def distrust(self, before: Mapping[str, int], reason: Gap) -> None:
        """What was scored since ``before`` does not count as scored, see ``Monitor.distrust``."""
        for monitor in self._among(before):
            monitor.distrust(before, reason)

    def steered(self, request_id: str, doses: Mapping[int, Float64]) -> None:
        """Rows of a live request have been written to, see ``Monitor.steered``."""
        monitor = self._of.get(request_id)
        if monitor is not None:
            monitor.steered(request_id, doses)

    def finish(self, request_id: str, *, num_positions: int, sampled: int, aborted: bool) -> Ended | None:
        """End a request, see ``Monitor.finish``."""
        monitor = self._of.pop(request_id, None)
        if monitor is None:
            return None
        return monitor.finish(request_id, num_positions=num_positions, sampled=sampled, aborted=aborted)

    @property
    def policy_seconds(self) -> float:
        """What rules have taken since the tally was taken, in all generations."""
        return self._left.policy_seconds + sum(item.tally.policy_seconds for item in self._monitors.values())

    def take_tally(self) -> Tally:
        """Counts since the call before, of all generations."""
        tally, self._left = self._left, Tally()
        for monitor in self._monitors.values():
            tally.add(monitor.take_tally())
        return tally

    def _among(self, request_ids: Collection[str]) -> list[Monitor]:
        """The monitors of these requests, each once."""
        found = (self._of[name] for name in request_ids if name in self._of)
        return list({id(monitor): monitor for monitor in found}.values())

    def _has_requests(self, monitor: Monitor) -> bool:
        return any(owner is monitor for owner in self._of.values())

    def _forget(self, digest: str) -> None:
        self._left.add(self._monitors.pop(digest).take_tally())
        self._replaced.pop(digest, None)


def part_of(step: StepReadouts, request_ids: Collection[str]) -> StepReadouts:
    """The step with some of its requests alone, in the same order."""
    wanted = set(request_ids)
    kept = [number for number, request_id in enumerate(step.request_ids) if request_id in wanted]
    rows = [np.arange(step.starts[number], step.starts[number] + step.counts[number]) for number in kept]
    index = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
    counts = step.counts[kept]
    return StepReadouts(
        [step.request_ids[number] for number in kept],
        counts,
        np.cumsum(counts) - counts,
        step.positions[index],
        step.readouts[index],
    )
