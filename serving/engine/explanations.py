"""Explains flagged requests in the API process, behind their replies: which latents were active where a rule fired.

A request on which a rule fired is computed twice more once it has ended, one such request at a time and at the lowest
priority: first for the scores of its tokens, then for whole rows at those with the highest. They are encoded in a
thread, and told to the audit trail. Nobody waits for it: what finds no room in the queue is dropped and counted.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import structlog
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from monitor.check import Check
from monitor.events import Explanation, LatentSeen, TokenExplained
from monitor.explain import ExplainSettings
from monitor.explain_metrics import ExplainMetrics, Outcome
from probes.errors import TelltaleError
from probes.sae.active import active_rows
from probes.sae.file import load_sae
from serving.engine.flagged import Flagged, read_positions
from serving.engine.frontend import Frontend

log = structlog.get_logger(__name__)

_LOWEST_PRIORITY: Final = 2**31 - 1
_PATIENCE_SECONDS: Final = 120.0
"""For one request that is computed again, in the queue and out of it."""
_WINDOW_SECONDS: Final = 60.0
_NORM_TOLERANCE: Final = 1e-3
"""Of the squared norm that the tap has read of the same row, in another pass of another batch."""

Float32 = npt.NDArray[np.float32]


class UnexplainedError(TelltaleError, RuntimeError):
    """A flagged request cannot be explained: something of it is not there any more, or was not read."""


@dataclass(frozen=True, slots=True)
class _Request:
    """A flagged request, as the engine kept it."""

    tokens: list[int]
    num_prompt: int
    stream_from: int
    roles: npt.NDArray[np.uint8] | None


class Explanations:
    """Of one API process.

    Args:
        engine: vLLM's ``AsyncLLM``.
        frontend: of this process.
        enter: writes an explanation down, given the request and its tokens, one for each that is told.
        metrics: what Prometheus is told.
        clock: seconds that only rise.
    Raises:
        probes.artifact.ArtifactError: the sparse autoencoder cannot be read.
    """

    def __init__(
        self,
        engine: Any,
        frontend: Frontend,
        enter: Callable[[Explanation, Flagged, Sequence[int]], None],
        metrics: ExplainMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        deployment = frontend.deployment
        if deployment.file.config.explain is None or deployment.explainer is None:
            raise UnexplainedError("the policy file has no 'explain'.")
        self._settings: ExplainSettings = deployment.file.config.explain
        self._stored = load_sae(deployment.explainer.path)
        self._sae = self._stored.sae()
        self._engine = engine
        self._frontend = frontend
        self._plan = deployment.plan
        self._enter = enter
        self._metrics = metrics
        self._clock = clock
        self._priority = _LOWEST_PRIORITY if engine.vllm_config.scheduler_config.policy == "priority" else 0
        self._longest = int(engine.vllm_config.model_config.max_model_len) - 1
        self._waiting: deque[Flagged] = deque()
        self._arrived = asyncio.Event()
        self._begun: deque[float] = deque(maxlen=self._settings.per_minute)

    def offer(self, flagged: Flagged) -> None:
        """A rule has fired on a request that has ended. Returns at once; of too many, the oldest are dropped."""
        self._waiting.append(flagged)
        if len(self._waiting) > self._settings.queue:
            self._waiting.popleft()
            self._metrics.count(Outcome.DROPPED)
        self._metrics.waiting(len(self._waiting))
        self._arrived.set()

    async def watch(self) -> None:
        """Explain what is offered, one after the other, until the engine ends."""
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            await asyncio.sleep(self._until_allowed())
            flagged = self._waiting.popleft()
            self._metrics.waiting(len(self._waiting))
            self._begun.append(self._clock())
            try:
                await self._explain(flagged)
            except (asyncio.CancelledError, EngineDeadError):
                raise
            except (UnexplainedError, TimeoutError) as error:
                self._metrics.count(Outcome.FAILED)
                log.warning("a flagged request was not explained", rule=flagged.rule, why=str(error) or "out of time")
            except Exception:
                # Whatever vLLM or a detector says: one explanation is missing, and the next one is tried.
                self._metrics.count(Outcome.FAILED)
                log.exception("a flagged request was not explained", rule=flagged.rule)
            else:
                self._metrics.count(Outcome.EXPLAINED)

    def _until_allowed(self) -> float:
        """Seconds until one more may begin."""
        if len(self._begun) < self._settings.per_minute:
            return 0.0
        return max(0.0, self._begun[0] + _WINDOW_SECONDS - self._clock())

    async def _explain(self, flagged: Flagged) -> None:
        self._require_in_force(flagged)
        self._plan = flagged.plan
        check = self._plan.checks[flagged.check]
        if not isinstance(check, Check):  # pragma: no cover - of a sum, one of its terms is named
            raise UnexplainedError(f"{check.detector!r} is no detector.")
        request = await self._kept(flagged.about.request_id)
        # The last token of a reply is never fed back; what came behind the flag was not read when the rule fired.
        stop = len(request.tokens) - 1 if flagged.at is None else flagged.at + 1
        tokens = request.tokens[: max(1, min(stop, len(request.tokens), self._longest))]
        read = read_positions(
            check,
            num_positions=len(tokens),
            num_prompt=request.num_prompt,
            stream_from=request.stream_from,
            roles=request.roles,
        )
        readouts, _ = await self._computed(tokens, ())
        self._require_in_force(flagged)
        scores = await asyncio.to_thread(self._scores, check.detector, readouts)
        chosen = _highest(scores, read, self._settings.tokens)
        if not len(chosen):
            raise UnexplainedError("no token that the rule read has a score.")
        again, rows = await self._computed(tokens[: int(chosen[-1]) + 1], [int(place) for place in chosen])
        self._require_same(again, rows, chosen)
        explained = await asyncio.to_thread(self._tokens, check.detector, rows, chosen, scores)
        card = self._stored.card
        event = Explanation(
            plan=self._plan.digest,
            decision=flagged.decision,
            rule=flagged.rule,
            detector=check.detector,
            stage=check.stage,
            sae=card.name,
            sae_digest=card.tensors_digest,
            tap=card.tap,
            steered=flagged.steered,
            tokens=explained,
        )
        self._enter(event, flagged, [tokens[place] for place in chosen])

    def _require_in_force(self, flagged: Flagged) -> None:
        """Under another policy, other directions may stand where this one's were read."""
        if flagged.plan.digest != self._frontend.deployment.plan.digest:
            raise UnexplainedError("another policy has been put in force since.")

    async def _kept(self, request_id: str) -> _Request:
        told = await self._ask("flagged", request_id)
        if not told:
            raise UnexplainedError("the engine does not keep its tokens any more: too many others were flagged since.")
        roles = told["roles"]
        return _Request(
            tokens=np.frombuffer(told["tokens"], dtype=np.int32).tolist(),
            num_prompt=told["num_prompt"],
            stream_from=told["stream_from"],
            roles=np.frombuffer(roles, dtype=np.uint8) if roles is not None else None,
        )

    async def _computed(self, tokens: Sequence[int], positions: Sequence[int]) -> tuple[Float32, Float32]:
        """Compute tokens again: what the taps read of each, and whole rows at the positions."""
        request_id = f"telltale-reread-{uuid.uuid4().hex}"
        self._frontend.begin_reread(request_id, positions)
        answer = asyncio.create_task(self._generate(tokens, request_id))
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                internal = await answer
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
            self._frontend.end_reread(request_id)
        told = await self._ask("reread", internal)
        if not told:
            raise UnexplainedError("the engine does not know what came of computing it again.")
        readouts = np.frombuffer(told["readouts"], dtype=np.float32).reshape(len(tokens), -1)
        rows = np.frombuffer(told["rows"], dtype=np.float32).reshape(-1, self._sae.d_model)
        if len(rows) != len(positions):
            raise UnexplainedError("whole rows are missing: too many were asked for at once, or a layer did not run.")
        return readouts, rows

    async def _generate(self, tokens: Sequence[int], request_id: str) -> str:
        """Send it and wait; returns the engine's own id for it."""
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = tokens_input(prompt_token_ids=list(tokens), cache_salt=request_id)
        async for _ in self._engine.generate(prompt, params, request_id, priority=self._priority):
            pass
        return self._frontend.reread_id(request_id)

    async def _ask(self, op: str, request_id: str) -> Mapping[str, Any]:
        """What the one engine says that knows the request."""
        question = self._engine.engine_core.call_utility_all_async("telltale_control", op, {"request_id": request_id})
        async with asyncio.timeout(_PATIENCE_SECONDS):
            answers: list[Mapping[str, Any]] = await question
        return next((answer for answer in answers if answer), {})

    def _scores(self, name: str, readouts: Float32) -> npt.NDArray[np.float64]:
        """(n,) of a detector; of one with several numbers a token, the largest."""
        bank = self._plan.bank
        first = bank.index[name]
        found: npt.NDArray[np.float64] = bank.score(readouts)[:, first : first + bank.detector(name).channels]
        largest: npt.NDArray[np.float64] = found.max(axis=1)
        return largest

    def _require_same(self, readouts: Float32, rows: Float32, chosen: npt.NDArray[np.intp]) -> None:
        """Where a tap reads the same stream, whole rows are those that it has read."""
        if self._sae.tap not in self._plan.bank.taps:
            return
        norms = readouts[chosen, self._plan.bank.norm_column(self._sae.tap)].astype(np.float64)
        found = np.square(rows.astype(np.float64)).sum(axis=1)
        if not np.allclose(found, norms, rtol=_NORM_TOLERANCE):
            raise UnexplainedError("whole rows are not those that the tap has read.")

    def _tokens(
        self, name: str, rows: Float32, chosen: npt.NDArray[np.intp], scores: npt.NDArray[np.float64]
    ) -> tuple[TokenExplained, ...]:
        detector = self._plan.bank.detector(name)
        found = active_rows(self._sae, rows, top=self._settings.top, detector=detector)
        return tuple(
            TokenExplained(
                position=int(place),
                score=float(scores[place]),
                active=row.active,
                rest=None if row.by_latents is None else float(scores[place]) - row.by_latents,
                latents=tuple(
                    LatentSeen(latent=each.latent, activity=each.activity, part=each.part) for each in row.latents
                ),
            )
            for place, row in zip(chosen, found, strict=True)
        )


def _highest(scores: npt.NDArray[np.float64], read: npt.NDArray[np.intp], count: int) -> npt.NDArray[np.intp]:
    """Of the positions that are read, those with the highest scores, in order of position."""
    there = read[np.isfinite(scores[read])]
    chosen: npt.NDArray[np.intp] = np.sort(there[np.argsort(-scores[there], kind="stable")[:count]])
    return chosen
