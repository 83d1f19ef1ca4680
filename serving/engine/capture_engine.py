"""An engine in this process that captures activations: vLLM's own scheduler, our workers, the identity at each tap."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from probes.fit.reading.activation_writer import ShardBuffer
from probes.taps import Tap
from serving.engine import compat
from serving.engine.capture import CAPTURE_KEY
from serving.engine.capture_rows import CaptureRows
from serving.engine.plugin import use_tapped_worker
from serving.engine.readouts import ATTRIBUTE
from serving.engine.refusals import RefusedError, refuse_unmonitorable
from serving.engine.runtime import CONFIG_VARIABLE, load_worker_plan, policy_path

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def capture_config(arguments: Sequence[str], taps: Sequence[Tap]) -> VllmConfig:
    """VLLM's configuration of an engine that captures.

    The whole process is the engine's from then on.

    Args:
        arguments: of vLLM, the model first.
        taps: what is captured.
    Raises:
        probes.errors.TelltaleError: vLLM is not the one that was read, this process serves, or a setting would leave
            rows out.
    """
    compat.require_version()
    if policy_path() is not None:
        raise RefusedError(f"{CONFIG_VARIABLE} is set: collecting follows no policy file. Unset it.")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    compat.require_touchpoints()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="telltale collect"))
    chosen = EngineArgs.from_cli_args(parser.parse_args(["--model", *arguments]))
    if chosen.data_parallel_size > 1:
        raise RefusedError("--data-parallel-size: one engine collects. Leave it out, or split the file of prompts.")
    if not isinstance(chosen.additional_config, dict) or CAPTURE_KEY in chosen.additional_config:
        raise RefusedError(
            f"--additional-config must be a JSON object without {CAPTURE_KEY}: --taps says what is read."
        )
    # A cached position is not computed, so nothing would read it.
    chosen.enable_prefix_caching = False
    chosen.additional_config = {**chosen.additional_config, CAPTURE_KEY: [str(tap) for tap in taps]}
    config = chosen.create_engine_config(UsageContext.LLM_CLASS)
    refuse_unmonitorable(config)
    use_tapped_worker(config)
    load_worker_plan(config)  # a layer that the model does not have is refused before its weights are read
    return config


def batch_settings(config: VllmConfig) -> dict[str, str | int | bool]:
    """What decides how requests are batched and computed: with the same, the same input gives the same bits."""
    scheduling, parallel = config.scheduler_config, config.parallel_config
    return {
        "vllm": " ".join(compat.installed_version()),
        "max_model_len": config.model_config.max_model_len,
        "max_num_batched_tokens": scheduling.max_num_batched_tokens,
        "max_num_seqs": scheduling.max_num_seqs,
        "kv_cache_memory_bytes": config.cache_config.kv_cache_memory_bytes or 0,
        "enforce_eager": config.model_config.enforce_eager,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
    }


class CaptureEngine:
    """A started engine.

    Args:
        config: of ``capture_config``.
    """

    def __init__(self, config: VllmConfig) -> None:
        from vllm import SamplingParams
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        self._bank = load_worker_plan(config).bank
        self._engine = LLMEngine.from_vllm_config(config, usage_context=UsageContext.LLM_CLASS, disable_log_stats=True)
        self._core = self._engine.engine_core.engine_core
        # On the instance: whichever scheduler vLLM has chosen, every result of a step passes here first.
        self._take_in: Callable[..., Any] = self._core.scheduler.update_from_output
        self._core.scheduler.update_from_output = self._update_from_output
        self._params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        self._rows: CaptureRows | None = None

    def fill(self, shard: ShardBuffer, progress: Callable[[int], None]) -> int:
        """Run the requests of a shard, alone, and put their rows into it.

        No other request is in the engine before or after, so the same shard is computed in the same batches each time.

        Args:
            shard: with its requests.
            progress: told after each step how many tokens of the shard are there.
        Returns: how many leading positions are sinks.
        Raises:
            serving.engine.capture_rows.CaptureError: a row is missing.
        """
        rows = self._rows = CaptureRows(shard, self._bank)
        for number, request in enumerate(shard.requests):
            prompt = {"prompt_token_ids": list(request.tokens)}
            rows.expect(self._engine.add_request(str(number), prompt, self._params), number)
        # Also the step without tokens in which the workers forget the last requests, and what is still under way.
        while self._engine.has_unfinished_requests() or self._core.scheduler.has_requests() or self._core.batch_queue:
            self._engine.step()
            progress(rows.tokens_seen)
        self._rows = None
        return rows.finish()

    def close(self) -> None:
        """End the engine and its workers."""
        self._engine.engine_core.shutdown()

    def _update_from_output(self, scheduler_output: Any, model_output: Any) -> Any:
        scheduled: Mapping[str, int] = scheduler_output.num_scheduled_tokens
        if self._rows is not None:
            self._rows.take(scheduled, getattr(model_output, ATTRIBUTE, None))
        return self._take_in(scheduler_output, model_output)
