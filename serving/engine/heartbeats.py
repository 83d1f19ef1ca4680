"""The canaries of an engine whose policy is reloaded: those of the plan that runs, and those that prove the next one.

Whether what was read is to be trusted is said by the canaries of the plan that runs: they guard the way from the layers
to the scheduler, which all plans share. Those of a plan that is not in force yet only say whether it may be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from monitor.canary import Failed
from monitor.config import CanarySettings
from monitor.policy import Plan
from serving.engine.heartbeat import Heartbeat

if TYPE_CHECKING:
    from serving.engine.readouts import WorkerReadouts


class Heartbeats:
    """One heartbeat for each plan.

    Args:
        plan: that runs.
        settings: period and deadline.
        vocab: tokens of the model.
    """

    def __init__(self, plan: Plan, settings: CanarySettings, *, vocab: int) -> None:
        self._settings = settings
        self._vocab = vocab
        self._current = plan.digest
        self._beats = {plan.digest: Heartbeat(plan, settings, vocab=vocab)}

    def add(self, plan: Plan) -> None:
        """A plan that is to be proved. Whatever an earlier trial of it has shown is forgotten."""
        if plan.digest != self._current:
            self._beats[plan.digest] = Heartbeat(plan, self._settings, vocab=self._vocab)

    def commit(self, plan: Plan) -> None:
        """A plan runs from now on: its canaries say whether what is read is to be trusted, and no others."""
        if plan.digest not in self._beats:
            self.add(plan)
        self._beats = {plan.digest: self._beats[plan.digest]}
        self._current = plan.digest

    def discard(self, digest: str) -> None:
        """A plan will not run."""
        if digest != self._current:
            self._beats.pop(digest, None)

    def admit(self, request_id: str, tokens: Sequence[int], plan: str | None = None) -> None:
        """A canary has come, of the plan that runs if it does not say, or of one that has gone."""
        self._beats.get(plan or "", self._beats[self._current]).admit(request_id, tokens)

    def scheduled(self, request_ids: Iterable[str]) -> None:
        """These requests are in the next step."""
        for beat in self._beats.values():
            beat.scheduled(request_ids)

    def take(self, readouts: WorkerReadouts | None) -> Failed | None:
        """Look at a step before anything of it is judged, see ``Heartbeat.take``."""
        failures = {name: beat.take(readouts) for name, beat in self._beats.items()}
        return failures[self._current]

    def finish(self, request_id: str, *, aborted: bool) -> None:
        """A request has ended; others than canaries are ignored."""
        for beat in self._beats.values():
            beat.finish(request_id, aborted=aborted)

    def status(self, plan: str | None = None) -> dict[str, Any]:
        """How the canaries of a plan do, see ``Heartbeat.status``; of the one that runs if none is named.

        Raises:
            ValueError: nobody has asked to prove it.
        """
        beat = self._beats.get(plan or self._current)
        if beat is None:
            raise ValueError(f"no canaries of the plan {plan} are expected here")
        return beat.status()
