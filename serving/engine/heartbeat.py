"""The canaries of one engine, where it schedules: their rows are taken out of the steps and compared with the cards.

A canary is no user's request: the monitor does not know it, so it is neither judged nor counted among them. Which
requests are canaries is said by sealed data alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import structlog

from monitor.canary import CanaryFailure, CanaryPrompt, CanaryWatch, Failed, canary_prompts
from monitor.config import CanarySettings
from monitor.policy import Plan

if TYPE_CHECKING:
    from serving.engine.readouts import WorkerReadouts

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Live:
    """A canary whose tokens have not all come back.

    Attributes:
        prompt: what it is compared with.
        scores: (tokens, detectors) float64, NaN until they come.
        seen: (tokens,).
        judged: the verdict is known.
    """

    prompt: CanaryPrompt
    scores: npt.NDArray[np.float64]
    seen: npt.NDArray[np.bool_]
    judged: bool = False


class Heartbeat:
    """Canaries that are under way, and whether the engine passes.

    Args:
        plan: whose bank scores them.
        settings: period and deadline.
        vocab: tokens of the model.
        clock: seconds that only rise.
    """

    def __init__(
        self, plan: Plan, settings: CanarySettings, *, vocab: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bank = plan.bank
        self._used = plan.bank.used_columns()
        self._clock = clock
        prompts = canary_prompts(plan.cards, plan.bank.index, vocab=vocab)
        self._watch = CanaryWatch(prompts, every=settings.every_seconds, deadline=settings.deadline_seconds)
        self._live: dict[str, _Live] = {}
        self._failing: Failed | None = None
        self._deviations: dict[tuple[int, ...], float] = {}

    def admit(self, request_id: str, tokens: Sequence[int]) -> None:
        """A canary has come. Tokens that no card knows are only checked for being read at all."""
        prompt = self._watch.prompt(tokens) or CanaryPrompt(tuple(tokens))
        shape = (len(prompt.tokens), self._bank.num_scores)
        self._live[request_id] = _Live(prompt, np.full(shape, np.nan), np.zeros(shape[0], dtype=bool))
        self._watch.arrived(request_id, self._clock())

    def scheduled(self, request_ids: Iterable[str]) -> None:
        """These requests are in the next step."""
        if self._live:
            for request_id in self._live.keys() & set(request_ids):
                self._watch.began(request_id, self._clock())

    def take(self, readouts: WorkerReadouts | None) -> Failed | None:
        """Look at a step before anything of it is judged.

        Args:
            readouts: of all its requests; None if they were lost.
        Returns: why what was read is not to be trusted; None if it is.
        """
        if self._live and readouts is not None:
            starts = np.cumsum(readouts.counts) - readouts.counts
            for request_id, start, count in zip(readouts.request_ids, starts, readouts.counts, strict=True):
                if request_id in self._live:
                    self._note(request_id, readouts, slice(int(start), int(start + count)))
        failing = self._watch.failing(self._clock())
        if failing is not None and failing != self._failing:
            log.error("the canary fails; requests follow on_gap", reason=failing.reason.value, detail=failing.detail)
        elif failing is None and self._failing is not None:
            log.warning("the canary passes again")
        self._failing = failing
        return failing

    def finish(self, request_id: str, *, aborted: bool) -> None:
        """A request has ended; others than canaries are ignored."""
        live = self._live.pop(request_id, None)
        if live is None or live.judged:
            return
        if aborted:
            self._watch.withdrawn(request_id, self._clock())
        else:
            self._judge(request_id, live)

    def status(self) -> dict[str, Any]:
        """How the canaries do, as plain data: ``failure`` (reason, detail) or None, ``passed``, ``waiting``.

        ``deviation`` is the largest difference from the cards in the newest round, as a share of what is allowed.
        """
        failing = self._watch.failing(self._clock())
        return {
            "failure": [failing.reason.value, failing.detail] if failing is not None else None,
            "passed": self._watch.passed,
            "waiting": self._watch.waiting,
            "deviation": max(self._deviations.values(), default=0.0),
        }

    def _note(self, request_id: str, readouts: WorkerReadouts, rows: slice) -> None:
        live = self._live[request_id]
        inside = readouts.positions[rows] < len(live.seen)
        positions, found = readouts.positions[rows][inside], readouts.readouts[rows][inside]
        if live.judged or not len(positions):
            return
        try:
            scores = self._bank.score(found)
        except Exception as error:
            # Whatever a detector does with the numbers: its canary has not passed.
            log.exception("the canary could not be scored")
            live.judged = True
            verdict = Failed(CanaryFailure.ERROR, f"canary: scoring failed ({type(error).__name__})")
            self._watch.done(request_id, live.prompt.tokens, verdict, self._clock())
            return
        scores[~np.isfinite(found[:, self._used]).all(axis=1)] = np.nan
        live.scores[positions] = scores
        live.seen[positions] = True
        if live.seen.all():
            self._judge(request_id, live)

    def _judge(self, request_id: str, live: _Live) -> None:
        live.judged = True
        verdict = live.prompt.compare(live.scores, live.seen)
        if np.isfinite(deviation := live.prompt.deviation(live.scores)):
            self._deviations[live.prompt.tokens] = deviation
        self._watch.done(request_id, live.prompt.tokens, verdict, self._clock())
