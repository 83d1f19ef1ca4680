"""Sends the canaries from the API process, at the start and then periodically, and asks each engine how they did.

The engine judges; this process only knows what it was told. Users' requests are not held up: a canary is a short
prompt with one new token, in a cache of its own.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from monitor.canary import CanaryFailure, CanaryPrompt, Failed, canary_prompts
from monitor.exporter import Exporter
from serving.deployment import Deployment
from serving.engine.frontend import Frontend

log = structlog.get_logger(__name__)

_FIRST = -(2**31)
"""Where requests have priorities, canaries come first: clients that send many must not be able to silence them."""


class Canaries:
    """The canaries of all engines that this API process talks to.

    Args:
        engine: vLLM's ``AsyncLLM``.
        frontend: of this process.
        deployment: whose canaries; what the process serves if left out.

    Attributes:
        turn: held by whoever sends a round, or lets another plan's canaries take over.
        failure: why the newest round did not pass; None if it did. Before the first round: that none came.
        seconds: that the newest round took.
        deviation: largest difference of its scores from the cards', as a share of what is allowed.
    """

    def __init__(self, engine: Any, frontend: Frontend, deployment: Deployment | None = None) -> None:
        deployment = deployment or frontend.deployment
        plan, config = deployment.plan, deployment.file.config
        self._plan = plan.digest
        self.turn = asyncio.Lock()
        self._engine = engine
        self._frontend = frontend
        self._settings = config.canary
        self._priority = _FIRST if engine.vllm_config.scheduler_config.policy == "priority" else 0
        self.prompts = canary_prompts(
            plan.cards, plan.bank.index, vocab=int(engine.vllm_config.model_config.get_vocab_size())
        )
        self.failure: Failed | None = Failed(CanaryFailure.MISSING, "canary: none has been sent yet")
        self.seconds = 0.0
        self.deviation = 0.0

    def follow(self, proved: Canaries) -> None:
        """Another plan runs, whose canaries have passed: from now on they are sent. For whoever has the ``turn``."""
        self._plan, self.prompts = proved._plan, proved.prompts
        self.failure, self.seconds, self.deviation = proved.failure, proved.seconds, proved.deviation

    async def round(self) -> Failed | None:
        """Send every prompt to every engine, and note in ``failure`` what they say.

        Raises:
            EngineDeadError: an engine has ended.
        """
        async with self.turn:
            return await self._timed_round()

    async def _timed_round(self) -> Failed | None:
        began = time.monotonic()
        try:
            self.failure = await self._round()
        except (asyncio.CancelledError, EngineDeadError):
            raise
        except Exception as error:
            # Whatever vLLM says of a request that it cannot take: no canary has passed.
            log.exception("the canary could not be sent")
            self.failure = Failed(CanaryFailure.ERROR, f"canary: could not be sent ({type(error).__name__})")
        self.seconds = time.monotonic() - began
        return self.failure

    async def watch(self, exporter: Exporter) -> None:
        """Send rounds until the engine ends; while they fail, no less often than the deadline."""
        every, deadline = self._settings.every_seconds, self._settings.deadline_seconds
        while True:
            await asyncio.sleep(every if self.failure is None else min(every, deadline))
            try:
                failure = await self.round()
            except EngineDeadError:
                exporter.not_ready()
                return
            if failure is None:
                exporter.canary_passed(self.seconds, self.deviation)
            else:
                exporter.canary_failed(failure.reason)
                self._frontend.canary_failed(failure)
                log.error("not ready: the canary fails", reason=failure.reason.value, detail=failure.detail)

    async def _round(self) -> Failed | None:
        statuses = await self._ask()
        if statuses is None:
            return self._no_answer()
        ranks: Sequence[int | None] = range(len(statuses)) if len(statuses) > 1 else (None,)
        await asyncio.gather(*(self._send_all(rank) for rank in ranks))
        statuses = await self._ask()
        if statuses is None:
            return self._no_answer()
        self.deviation = max(float(status["deviation"]) for status in statuses)
        for rank, status in enumerate(statuses):
            if status["failure"] is not None:
                return _failed(status["failure"], rank, of=len(statuses))
            if not status["passed"]:
                return Failed(CanaryFailure.NOT_SEEN, f"canary: engine {rank} has not seen every prompt")
        return None

    async def _send_all(self, rank: int | None) -> None:
        for prompt in self.prompts:
            await self._send(prompt, rank)

    async def _send(self, prompt: CanaryPrompt, rank: int | None) -> None:
        """Send one and wait: as long as it stands in the queue, and then for the deadline."""
        request_id = f"telltale-canary-{uuid.uuid4().hex}"
        self._frontend.begin_canary(request_id, self._plan)
        answer = asyncio.create_task(self._generate(prompt, rank, request_id))
        try:
            while True:
                done, _ = await asyncio.wait({answer}, timeout=self._settings.deadline_seconds)
                if done:
                    answer.result()
                    return
                statuses = await self._ask()
                if statuses is None or any(status["failure"] is not None for status in statuses):
                    return  # the question at the end of the round says it
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
            self._frontend.end_canary(request_id)

    async def _generate(self, prompt: CanaryPrompt, rank: int | None, request_id: str) -> None:
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        # The salt makes its blocks its own: it is never answered from a cache, and no request is from its blocks.
        tokens = tokens_input(prompt_token_ids=list(prompt.tokens), cache_salt=request_id)
        outputs = self._engine.generate(tokens, params, request_id, priority=self._priority, data_parallel_rank=rank)
        async for _ in outputs:
            pass

    async def _ask(self) -> list[Mapping[str, Any]] | None:
        body = {"plan": self._plan}
        question = self._engine.engine_core.call_utility_all_async("telltale_control", "canary", body)
        try:
            async with asyncio.timeout(self._settings.deadline_seconds):
                answers: list[Mapping[str, Any]] = await question
        except TimeoutError:
            return None
        return answers

    def _no_answer(self) -> Failed:
        return Failed(CanaryFailure.NO_ANSWER, f"canary: an engine said nothing for {self._settings.deadline}")


def _failed(said: Sequence[str], rank: int, *, of: int) -> Failed:
    reason, detail = said
    return Failed(CanaryFailure(reason), detail if of == 1 else f"engine {rank}: {detail}")
