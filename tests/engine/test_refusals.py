"""Settings under which tokens could pass unseen end the start, each with its name and what to do."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.deployment import check_policy
from serving.engine.capture import CAPTURE_KEY
from serving.engine.plugin import configure
from serving.engine.refusals import RefusedError, refuse_unmonitorable, refuse_unsteerable
from tests.support.tiny import D_MODEL, TinyModel, save_direction

pytestmark = pytest.mark.engine

SETTINGS: dict[str, dict[str, Any]] = {
    "--enable-lora": {"enable_lora": True},
    "--scheduler-cls": {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
    "--kv-transfer-config": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
    "KV transfer or offloading": {"kv_offloading_size": 1.0},
}
PASSING: dict[str, dict[str, Any]] = {
    "plain": {},
    "tensor parallel": {"tensor_parallel_size": 2},
    "pipeline parallel": {"pipeline_parallel_size": 2},
    "data parallel": {"data_parallel_size": 2},
    "ngram drafts": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
}
# Settings that a CPU's configuration cannot be made with: they are put into a finished one.
LATER: dict[str, tuple[str, str, Any]] = {
    "--enable-dbo": ("parallel_config", "enable_dbo", True),
    "--prefill-context-parallel-size": ("parallel_config", "prefill_context_parallel_size", 2),
    "--decode-context-parallel-size": ("parallel_config", "decode_context_parallel_size", 2),
    "--kv-sharing-fast-prefill": ("cache_config", "kv_sharing_fast_prefill", True),
    "--enable-return-routed-experts": ("aux_output_config", "enable_return_routed_experts", True),
    "--runner pooling": ("model_config", "runner_type", "pooling"),
}
VARIABLES = (
    "VLLM_USE_RUST_FRONTEND",
    "VLLM_SERVER_DEV_MODE",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_ALLOW_INSECURE_SERIALIZATION",
    "VLLM_ENABLE_RESPONSES_API_STORE",
)


def config_with(model: TinyModel, **settings: Any) -> Any:
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    if "kv_transfer_config" in settings:
        settings["kv_transfer_config"] = KVTransferConfig(**settings["kv_transfer_config"])
    arguments = EngineArgs(model=str(model.path), dtype="float32", enforce_eager=True, max_model_len=256, **settings)
    # Not by our own wrap, which another test may have put there: what it refuses is what is tested.
    create = inspect.unwrap(EngineArgs.create_engine_config)
    return create(arguments)


@pytest.mark.parametrize("name", PASSING)
def test_what_was_tried_passes(tiny: TinyModel, name: str) -> None:
    refuse_unmonitorable(config_with(tiny, **PASSING[name]))


@pytest.mark.covers("setting under which tokens pass unseen", "noticed")
@pytest.mark.parametrize("flag", LATER)
def test_a_setting_of_other_devices_is_refused_by_its_name(tiny: TinyModel, flag: str) -> None:
    config = config_with(tiny)
    part, name, value = LATER[flag]
    setattr(getattr(config, part), name, value)
    with pytest.raises(RefusedError, match=flag):
        refuse_unmonitorable(config)


@pytest.mark.covers("setting under which tokens pass unseen", "noticed")
def test_drafts_of_another_model_are_refused(tiny: TinyModel) -> None:
    config = config_with(tiny, **PASSING["ngram drafts"])
    config.speculative_config.method = "eagle3"
    with pytest.raises(RefusedError, match="--speculative-config"):
        refuse_unmonitorable(config)


@pytest.mark.covers("setting under which tokens pass unseen", "noticed")
def test_token_sharded_experts_are_refused(tiny: TinyModel) -> None:
    config = config_with(tiny)
    parallel = config.parallel_config
    parallel.enable_expert_parallel = True
    parallel.all2all_backend = "allgather_reducescatter"
    parallel.tensor_parallel_size = parallel.data_parallel_size = 2
    with pytest.raises(RefusedError, match="--enable-expert-parallel"):
        refuse_unmonitorable(config)


@pytest.mark.covers("setting under which tokens pass unseen", "noticed")
@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_is_refused_by_its_name(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    config = config_with(tiny)
    monkeypatch.setenv(variable, "1")
    with pytest.raises(RefusedError, match=variable):
        refuse_unmonitorable(config)
    monkeypatch.setenv(variable, "0")
    refuse_unmonitorable(config)


@pytest.mark.covers("setting under which tokens pass unseen", "noticed")
@pytest.mark.parametrize("flag", SETTINGS)
def test_a_setting_is_refused_by_its_name(tiny: TinyModel, flag: str) -> None:
    with pytest.raises(RefusedError, match=flag) as caught:
        refuse_unmonitorable(config_with(tiny, **SETTINGS[flag]))
    assert "Leave it out" in str(caught.value)


def test_a_server_does_not_capture_activations(tiny: TinyModel) -> None:
    with pytest.raises(RefusedError, match=f"{CAPTURE_KEY} in --additional-config"):
        configure(config_with(tiny, additional_config={CAPTURE_KEY: ["resid_post.0"]}))


RULE = (
    "{name: r, when: {detector: trigger, stage: prompt%s}, do: {action: steer, steer: s, gate: latched}, mode: enforce}"
)
STEERED = """\
version: "1"
detectors: [{artifact: trigger.safetensors}]
steers: [{name: s, artifact: refusal_push.safetensors, op: add, strength: 0.5}]
policies:
  - {name: default, on_gap: block, on_uncalibrated: flag, rules: [%s]}
"""
BY_ONE_ROW = STEERED % (RULE % "")
BY_SEVERAL = STEERED % (RULE % ", aggregate: {kind: mean}, above: {value: 1.0}")


@pytest.mark.parametrize(
    ("policy", "setting", "refused"),
    [
        (BY_ONE_ROW, "pipeline parallel", "--pipeline-parallel-size above 1"),
        (BY_SEVERAL, "ngram drafts", "speculative decoding .--speculative-config."),
        (BY_ONE_ROW, "ngram drafts", None),
        (BY_SEVERAL, "tensor parallel", None),
    ],
)
def test_steering_is_refused_where_it_would_not_be_the_same_each_time(
    tiny: TinyModel, folder: Path, policy: str, setting: str, refused: str | None
) -> None:
    direction = np.eye(D_MODEL)[3]
    save_direction(folder / "refusal_push.safetensors", tiny.path, direction)
    (folder / "refusal.yaml").write_text(policy)
    plan = check_policy(folder / "refusal.yaml")
    config = config_with(tiny, **PASSING[setting])
    if refused is None:
        refuse_unsteerable(config, plan)
        return
    with pytest.raises(RefusedError, match=refused):
        refuse_unsteerable(config, plan)


@pytest.mark.covers("graph compiled without taps", "kept out")
def test_the_compile_cache_key_knows_the_taps(tiny: TinyModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was compiled without taps must never be loaded with them."""
    # Made before the variable is set: the plug-in must not install itself in the process of the tests.
    plain, tapped, again = (config_with(tiny) for _ in range(3))
    monkeypatch.setenv("TELLTALE_CONFIG", str(folder / "guarded.yaml"))
    monkeypatch.setenv("TELLTALE_KEY", "0" * 64)
    for config in (tapped, again):
        configure(config)
    assert tapped.compute_hash() == again.compute_hash() != plain.compute_hash()
    assert tapped.additional_config["telltale"]["taps"] == ["resid_post.0"]
    assert tapped.parallel_config.worker_cls == "serving.engine.worker.TelltaleCPUWorker"
    assert tapped.scheduler_config.scheduler_cls == "serving.engine.scheduler.TelltaleScheduler"
