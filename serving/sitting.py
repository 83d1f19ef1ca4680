"""One HTTP request's part in its session: what stood against it, and what has become of it. Knows no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from monitor.policy import Plan
from monitor.rollout import Subject
from monitor.sessions.store import SessionKey
from probes.card import Format


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read of a request with all its choices.

    Attributes:
        request_id: the engine's own.
        plan: that it was judged by.
        policy: position of its policy in the plan.
        fmt: how its text reached the model.
        statistics: in the order of the plan's checks; of several choices the largest.
    """

    request_id: str
    plan: Plan
    policy: int
    fmt: Format
    statistics: Sequence[float]


@dataclass(slots=True, eq=False)
class Sitting:
    """One HTTP request's part in its session.

    Attributes:
        tenant: whose request it is.
        keys: of the sessions that it belongs to; none by session where its client names none.
        imposed: names of the rules that stand against it.
        commit: enters a reading into the sessions; raises nothing.
        tickets: of the events that have to be stored before anything more of its response leaves.
    """

    tenant: str
    keys: Mapping[Subject, SessionKey]
    imposed: tuple[str, ...]
    commit: Callable[[Sitting, Reading], Awaitable[None]]
    tickets: list[Future[None]] = field(default_factory=list)
    _entering: set[asyncio.Future[None]] = field(default_factory=set)

    def take(self, reading: Reading) -> None:
        """A request has ended: enter it while the loop goes on."""
        task = asyncio.ensure_future(self.commit(self, reading))
        self._entering.add(task)
        task.add_done_callback(self._entering.discard)

    async def settled(self) -> None:
        """Wait until all that has ended so far is entered: the next request has to find it."""
        if self._entering:
            # Not `gather`: a client that leaves must not cancel what is being entered.
            await asyncio.wait(set(self._entering))
