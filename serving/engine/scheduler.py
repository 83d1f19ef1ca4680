"""vLLM's schedulers with the monitor inside: what a step read is judged before any output of the step leaves.

The monitor is authoritative here. A block stops the request in the same step, so that the token which was sampled
after the flagged one never exists for anybody outside.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import structlog
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import RequestStatus

from monitor.attempt import Attempt
from monitor.generations import Generations
from monitor.monitor import StepReadouts
from monitor.request import is_blocked
from monitor.types import STRICTEST, Gap
from probes.card import Format
from serving.engine.door import Door
from serving.engine.drafts import step_readouts
from serving.engine.faulty import faulty_requests, without
from serving.engine.heartbeats import Heartbeats
from serving.engine.holdback import BLOCKED, HoldBack
from serving.engine.prefix import PrefixReadouts, whole_group
from serving.engine.readouts import ATTRIBUTE, WorkerReadouts
from serving.engine.reporting import Reporting
from serving.engine.rereads import Rereads
from serving.engine.runtime import load_deployment
from serving.engine.steerbook import SteerBook
from serving.engine.trust import EXTRA_KEY, rollout_key, unseal

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

log = structlog.get_logger(__name__)


class MonitoredScheduler(Scheduler):
    """What both schedulers share; every method that it overrides stands in ``serving.engine.compat``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        deployment = load_deployment(self.vllm_config)
        plan = deployment.plan
        self._monitor = Generations(plan, rollout_key=rollout_key)
        self._hold_back = HoldBack()
        self._heartbeat = Heartbeats(
            plan, deployment.file.config.canary, vocab=self.vllm_config.model_config.get_vocab_size()
        )
        self._reporting = Reporting(self._monitor, self._hold_back.count)
        explain = deployment.file.config.explain
        self._rereads = Rereads(keep=explain.queue if explain is not None else 0, width=plan.bank.width)
        # Scored positions of requests before their cached prefixes were replayed, until their step is judged.
        self._before_replay: dict[str, int] = {}
        ahead = bool(self.vllm_config.scheduler_config.async_scheduling)
        self._steerbook = SteerBook(plan, block_size=self.hash_block_size, ahead=ahead)
        manager = self.kv_cache_manager
        # Where no layers keep a block for every token, cached prefixes are computed again.
        group = whole_group(manager) if manager.enable_caching else None
        self._prefix = (
            PrefixReadouts(manager, group, plan.bank, margin=self.num_spec_tokens, plan=plan.digest)
            if group is not None
            else None
        )
        self._door = Door(deployment, self._monitor, self._heartbeat, self._prefix, self._steerbook)

    def telltale_control(self, op: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What the API process asks between two steps.

        Args:
            op: ``flagged`` or ``reread`` (tokens of a flagged request, and what came of computing one again); or one of
                ``Door.answer``.
            body: of the operation: ``request_id`` for the first two.
        Raises:
            ValueError: another operation.
        """
        match op:
            case "flagged":
                return self._rereads.take_flagged(body["request_id"])
            case "reread":
                return self._rereads.take_result(body["request_id"])
            case _:
                return self._door.answer(op, body)

    def add_request(self, request: Request) -> None:
        """Admit a request to the monitor. Nothing gets past this method, whatever front end it came from."""
        extra = request.sampling_params.extra_args if request.sampling_params is not None else None
        trusted = unseal((extra or {}).get(EXTRA_KEY), request.request_id)
        if trusted is not None and (trusted.canary or trusted.judge or trusted.reread is not None):
            # Our own, and nobody's request.
            if trusted.canary:
                self._heartbeat.admit(request.request_id, request.prompt_token_ids or (), trusted.plan)
            elif trusted.reread is not None:
                self._rereads.admit(request.request_id, request.num_prompt_tokens, trusted.reread)
            request.skip_reading_prefix_cache = True
            super().add_request(request)
            return
        if trusted is None:
            log.warning(
                "a request without our signature: judged as raw text by the strictest policy", id=request.request_id
            )
        monitor = self._monitor.monitor_of(trusted.plan if trusted is not None else None)
        admitted = monitor.admit(
            request.request_id,
            num_prompt=request.num_prompt_tokens,
            policy=trusted.policy if trusted is not None else STRICTEST,
            fmt=trusted.fmt if trusted is not None else Format.RAW,
            prompt=trusted.prompt if trusted is not None else None,
            subjects=trusted.subjects if trusted is not None else None,
            attempt=trusted.attempt if trusted is not None else Attempt.UNHELD,
            refusal=trusted.refusal if trusted is not None else None,
            imposed=trusted.imposed if trusted is not None else (),
        )
        self._monitor.keep(admitted)
        depth = monitor.policy_of(admitted).hold_back
        self._hold_back.begin(request.request_id, depth=depth, num_prompt=request.num_prompt_tokens)
        self._reporting.admit(request)
        asked = trusted.steers if trusted is not None else {}
        self._steerbook.admit(request, admitted, monitor.policy_of(admitted), asked, monitor.plan)
        if self._prefix is None:
            # Cached positions are not computed, so nothing would read them.
            request.skip_reading_prefix_cache = True
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Remember where the rows of the step will belong."""
        step: SchedulerOutput = super().schedule(*args, **kwargs)
        self._heartbeat.scheduled(step.num_scheduled_tokens)
        self._rereads.scheduled(step)
        if self._prefix is not None:
            self._prefix.scheduled(step, self.requests)
        if not self._steerbook.is_empty:
            # What a cached prefix has opened is told with the rows behind it, while others can wait to be replayed.
            self._replay_filed(step, self._steerbook.gated(step.num_scheduled_tokens))
            self._steerbook.scheduled(step, self.requests)
        return step

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> Any:
        """The device has just been given this step: time for what no decision waits for."""
        if self._prefix is not None:
            self._prefix.settle()
            self._replay_filed(scheduler_output, scheduler_output.num_scheduled_tokens)
        return super().get_grammar_bitmask(scheduler_output)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        blocks, num_tokens, boundary, divergent = super()._get_local_prefix_cache_hit(request)
        if self._prefix is not None:
            filed = self._steerbook.needs_filed(request.request_id)
            plan, name = self._monitor.plan_of(request.request_id).digest, request.request_id
            allowed = self._prefix.allow(name, blocks, num_tokens, filed=filed, plan=plan) if num_tokens else 0
            if allowed < num_tokens:
                blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, allowed)
                num_tokens = allowed
        return blocks, num_tokens, boundary, divergent

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Judge the step, let vLLM finish it, hold back what is not scored yet, and report."""
        step_ids = list(scheduler_output.num_scheduled_tokens)
        if step_ids:
            started = time.perf_counter()
            self._observe(scheduler_output, model_runner_output)
            self._reporting.took(time.perf_counter() - started, getattr(model_runner_output, ATTRIBUTE, None))
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        for client in outputs.values():
            client.outputs = [
                released
                for output in client.outputs
                for released in self._hold_back.pass_through(
                    output, scored=self._monitor.positions_of(output.request_id)
                )
            ]
        self._reporting.attach(outputs, step_ids, self.requests)
        return outputs

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        if not is_blocked(self._monitor.get(request.request_id)):
            kept: tuple[list[int], bool] = super()._update_request_with_output(request, new_token_ids, is_stale)
            return kept
        del new_token_ids[:]
        new_token_ids, _ = super()._update_request_with_output(request, new_token_ids, is_stale)
        request.status = RequestStatus.FINISHED_STOPPED
        request.stop_reason = BLOCKED
        request.resumable = False
        return new_token_ids, True

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> tuple[Any, Any]:
        """Every request ends here, however it ends."""
        request_id = request.request_id
        cut_off = request.status in (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR)
        ended = self._monitor.finish(
            request_id,
            # A block drops the tokens of its step, also drafts that the model had accepted and computed.
            num_positions=max(request.num_tokens, self._monitor.positions_of(request_id)),
            sampled=request.num_output_tokens,
            aborted=cut_off,
        )
        if self._prefix is not None:
            self._prefix.forget(request_id)
        self._heartbeat.finish(request_id, aborted=cut_off)
        self._rereads.ended(request, ended)
        self._rereads.finish(request_id)
        self._steerbook.forget(request_id)
        self._reporting.end(request, ended)
        if request.status is RequestStatus.FINISHED_ABORTED:
            self._hold_back.drop(request_id)
        freed: tuple[Any, Any] = super()._free_request(request, delay_free_blocks)
        return freed

    def _observe(self, scheduler_output: SchedulerOutput, output: ModelRunnerOutput) -> None:
        found = getattr(output, ATTRIBUTE, None)
        readouts = found if isinstance(found, WorkerReadouts) else None
        distrusted = self._heartbeat.take(readouts) is not None
        self._rereads.take(readouts)
        step_ids = list(scheduler_output.num_scheduled_tokens)
        before = self._monitor.scored_of(step_ids) if distrusted else {}
        if self._before_replay:
            ahead = {name: self._before_replay.pop(name) for name in step_ids if name in self._before_replay}
            before |= ahead if distrusted else {}
        self._observe_step(scheduler_output, output, readouts, distrusted=distrusted)
        self._monitor.distrust(before, Gap.CANARY)
        if not self._steerbook.is_empty:
            self._steerbook.judged(step_ids, self._monitor)

    def _observe_step(
        self,
        scheduler_output: SchedulerOutput,
        output: ModelRunnerOutput,
        readouts: WorkerReadouts | None,
        *,
        distrusted: bool,
    ) -> None:
        try:
            if self._prefix is not None:
                # First of all: a request of this very step may rest on rows that another one has just computed.
                self._prefix.file(scheduler_output, None if distrusted else readouts)
                if distrusted:
                    # Nobody knows since when the readings have been wrong.
                    self._prefix.lose_all()
            if readouts is None:
                self._steerbook.lost(scheduler_output.num_scheduled_tokens)
                self._monitor.lose(self._reached(scheduler_output.num_scheduled_tokens), Gap.NO_READOUTS)
                return
            step = step_readouts(
                readouts, scheduler_output, output, requests=self.requests, max_model_len=self.max_model_len
            )
            if not self._steerbook.is_empty:
                self._steerbook.seen(step)
            try:
                self._replay(step)
                self._monitor.observe(step)
            # Nothing is swallowed: what is caught here costs at least the requests that caused it a gap each, which is
            # logged, counted and followed as the policy says. Let through, it would end the engine for everybody.
            except Exception:
                log.exception("the monitor failed on a step; its requests are taken apart")
                self._observe_apart(step, scheduler_output)
        except Exception:
            log.exception("the monitor failed on a step; its requests follow on_gap")
            self._monitor.lose(self._reached(scheduler_output.num_scheduled_tokens), Gap.MONITOR_ERROR)
            return
        if not self._steerbook.is_empty:
            # Not among what is caught above: these rows are scored, so that no gap would tell that steering failed.
            self._steerbook.tell(step, readouts.doses, self._monitor)
        seen = dict(zip(readouts.request_ids, readouts.counts.tolist(), strict=True))
        missing = {name: n for name, n in scheduler_output.num_scheduled_tokens.items() if seen.get(name) != n}
        if missing:
            self._monitor.lose(self._reached(missing), Gap.NO_READOUTS)

    def _observe_apart(self, step: StepReadouts, scheduler_output: SchedulerOutput) -> None:
        """Observe a step that has failed, without the requests that made it fail.

        Only scoring is tried again: it comes before any state changes, so nothing is fed twice. If each request can be
        scored, the fault lies elsewhere and the whole step is lost.
        """
        scheduled = scheduler_output.num_scheduled_tokens
        parts = self._monitor.parts(step)
        faulty = frozenset().union(*(faulty_requests(part, monitor.plan.bank) for monitor, part in parts))
        if faulty:
            rest = without(step, faulty)
            self._replay(rest)
            self._monitor.observe(rest)
        lost = {name: count for name, count in scheduled.items() if not faulty or name in faulty}
        self._monitor.lose(self._reached(lost), Gap.MONITOR_ERROR)

    def _replay_filed(self, step: SchedulerOutput, request_ids: Iterable[str]) -> None:
        """Replay those cached prefixes of a step's requests that rest on no step under way."""
        if self._prefix is not None:
            for request_id in self._prefix.replayable(request_ids):
                self._replay_ahead(request_id, step.num_scheduled_tokens[request_id])

    def _replay_ahead(self, request_id: str, num_scheduled: int) -> None:
        """Replay a cached prefix before the result of the request's first step is there."""
        assert self._prefix is not None  # noqa: S101 - asked for by its owner alone
        first = self.requests[request_id].num_computed_tokens - num_scheduled
        self._before_replay |= self._monitor.scored_of([request_id])
        try:
            rows = self._prefix.take_replay(request_id, before=first)
            self._steerbook.replayed(request_id, rows)
            self._monitor.replay(request_id, rows)
        except Exception:
            # Positions that were not scored are a gap as soon as those behind them come: nothing passes unseen.
            log.exception("the monitor failed on a cached prefix; its request follows on_gap", id=request_id)

    def _replay(self, step: StepReadouts) -> None:
        if self._prefix is None:
            return
        for request_id, start, count in zip(step.request_ids, step.starts, step.counts, strict=True):
            if count and self._prefix.has_replay(request_id):
                rows = self._prefix.take_replay(request_id, before=int(step.positions[start]))
                self._steerbook.replayed(request_id, rows)
                self._monitor.replay(request_id, rows)

    def _reached(self, scheduled: Mapping[str, int]) -> dict[str, int]:
        """Per request, the position after its last row of this step (steps in flight behind it not counted)."""
        reached = {}
        for request_id, count in scheduled.items():
            request = self.requests.get(request_id)
            if request is not None:
                reached[request_id] = request.num_computed_tokens - request.num_in_flight_tokens + count
        return reached


class TelltaleScheduler(MonitoredScheduler):
    """The synchronous scheduler, monitored."""


class TelltaleAsyncScheduler(MonitoredScheduler, AsyncScheduler):
    """The asynchronous scheduler, monitored."""
