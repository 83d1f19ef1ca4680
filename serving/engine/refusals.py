"""Settings of vLLM under which a token could pass unseen: refused at the start, each with its name and its reason."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from monitor.types import Mode
from probes.errors import TelltaleError
from serving.engine.layers import LayerError, require_architecture
from serving.engine.runtime import CONFIG_VARIABLE

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from monitor.policy import Plan

SPECULATORS = ("ngram",)
"""Ways to draft tokens that were run. The others bring a model of their own, whose rows nobody has looked at."""
_ENVIRONMENT = {
    "VLLM_USE_RUST_FRONTEND": "its front end knows neither refusals nor reports",
    "VLLM_SERVER_DEV_MODE": "development routes call into workers and reset caches behind the monitor's back",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "an adapter that no card names could be loaded while serving",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "code from a request could then run inside the engine",
    "VLLM_ENABLE_RESPONSES_API_STORE": "whoever knows a stored response's id could read it, whichever tenant it is of",
}


class RefusedError(TelltaleError, RuntimeError):
    """A setting of vLLM under which not every token would be scored."""


def refuse_unmonitorable(config: VllmConfig, *, schedulers: Collection[str] = ()) -> None:
    """Refuse what would leave a token unseen, and what nobody has tried.

    Args:
        config: vLLM's, finished.
        schedulers: names of our own scheduler classes.
    Raises:
        RefusedError: names the setting and says why.
    """
    model = config.model_config
    try:
        require_architecture(list(model.architectures))
    except LayerError as error:
        raise RefusedError(f"{model.model}: {error}") from error
    refusals = (*_of_model(config), *_of_parallelism(config), *_of_engine(config, schedulers), *_of_environment())
    for setting, why in refusals:
        raise RefusedError(
            f"{setting} cannot be monitored by this version ({why}), so the server does not start with it. Leave it "
            f"out, or unset {CONFIG_VARIABLE} to run vLLM unmonitored."
        )


def refuse_unsteerable(config: VllmConfig, plan: Plan) -> None:
    """Refuse to steer where nobody has tried it, or where it would not be the same each time.

    Args:
        config: vLLM's, finished.
        plan: of the policy file.
    Raises:
        RefusedError: names the setting and says why.
    """
    if not plan.steering.steers:
        return
    by_scheduler = any(
        rule.steer is not None and rule.gate is None and rule.mode is Mode.ENFORCE
        for policy in plan.policies
        for rule in policy.rules
    )
    parallel, settings = config.parallel_config, []
    if parallel.pipeline_parallel_size > 1:
        settings.append(("--pipeline-parallel-size above 1", "stages do not hand on what they wrote"))
    if by_scheduler and config.speculative_config is not None:
        settings.append(
            (
                "speculative decoding (--speculative-config)",
                "a rule that no single row decides would steer later where drafts are accepted",
            )
        )
    for setting, why in settings:
        raise RefusedError(
            f"{setting} cannot be served by this version together with the policy's steers ({why}). Leave it out, or "
            "take the steers out of the policy file."
        )


def refuse_unexplainable(config: VllmConfig, *, explains: bool) -> None:
    """Refuse to explain flags where whole rows do not reach the scheduler.

    Args:
        config: vLLM's, finished.
        explains: whether the policy file has ``explain``.
    Raises:
        RefusedError: names the setting and says why.
    """
    if explains and config.parallel_config.pipeline_parallel_size > 1:
        raise RefusedError(
            "--pipeline-parallel-size above 1 cannot be served by this version together with the policy's 'explain' "
            "(stages do not hand on whole rows). Leave it out, or take 'explain' out of the policy file."
        )


def _of_model(config: VllmConfig) -> Iterator[tuple[str, str]]:
    if config.model_config.runner_type != "generate":
        yield "a pooling model (--runner pooling)", "there is no reply to decide about"
    if config.lora_config is not None:
        yield "LoRA adapters (--enable-lora)", "detectors are calibrated on the weights without them"
    if config.cache_config.kv_sharing_fast_prefill:
        yield "--kv-sharing-fast-prefill", "its later layers compute only the last rows of a prompt"


def _of_parallelism(config: VllmConfig) -> Iterator[tuple[str, str]]:
    parallel = config.parallel_config
    if parallel.use_ubatching:
        yield "dual-batch overlap (--enable-dbo, --ubatch-size)", "two halves of a step would write to the same rows"
    if parallel.prefill_context_parallel_size > 1:
        yield "--prefill-context-parallel-size", "each rank sees only some of the tokens"
    if parallel.decode_context_parallel_size > 1:
        yield "--decode-context-parallel-size", "nobody has run it with taps"
    if parallel.use_sequence_parallel_moe:
        yield "--enable-expert-parallel with this all-to-all backend", "each rank holds only some rows of the stream"


def _of_engine(config: VllmConfig, schedulers: Collection[str]) -> Iterator[tuple[str, str]]:
    chosen = config.scheduler_config.scheduler_cls
    if chosen is not None and chosen not in schedulers:
        yield "a scheduler class of its own (--scheduler-cls)", "decisions are made in ours"
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in SPECULATORS:
        yield (
            f"speculative decoding by {speculative.method!r} (--speculative-config)",
            f"only {', '.join(SPECULATORS)} was run",
        )
    if config.kv_transfer_config is not None:
        yield "KV transfer or offloading (--kv-transfer-config)", "prefixes would come in that nobody has scored"
    if config.use_v2_model_runner and config.parallel_config.pipeline_parallel_size > 1:
        yield (
            "pipeline parallelism with the V2 model runner (set VLLM_USE_V2_MODEL_RUNNER=0)",
            "its stages do not hand on what they read",
        )
    if config.aux_output_config.enable_return_routed_experts:
        yield "--enable-return-routed-experts", "that field carries our reports"


def _of_environment() -> Iterator[tuple[str, str]]:
    for variable, why in _ENVIRONMENT.items():
        if os.environ.get(variable, "0").strip().lower() not in {"", "0", "false"}:
            yield variable, why
