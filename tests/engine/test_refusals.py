"""Settings under which tokens could pass unseen end the start, each with its name and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serving.engine.plugin import RefusedError, configure, refuse_unmonitorable
from tests.support.tiny import TinyModel

pytestmark = pytest.mark.engine

SETTINGS: dict[str, dict[str, Any]] = {
    "--tensor-parallel-size": {"tensor_parallel_size": 2},
    "--pipeline-parallel-size": {"pipeline_parallel_size": 2},
    "--data-parallel-size": {"data_parallel_size": 2},
    "--speculative-config": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    },
    "--enable-lora": {"enable_lora": True},
    "--scheduler-cls": {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
    "--kv-transfer-config": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
}


def config_with(model: TinyModel, **settings: Any) -> Any:
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    if "kv_transfer_config" in settings:
        settings["kv_transfer_config"] = KVTransferConfig(**settings["kv_transfer_config"])
    arguments = EngineArgs(model=str(model.path), dtype="float32", enforce_eager=True, max_model_len=256, **settings)
    return arguments.create_engine_config()


def test_plain_settings_pass(tiny: TinyModel) -> None:
    refuse_unmonitorable(config_with(tiny))


@pytest.mark.parametrize("flag", SETTINGS)
def test_a_setting_is_refused_by_its_name(tiny: TinyModel, flag: str) -> None:
    with pytest.raises(RefusedError, match=flag) as caught:
        refuse_unmonitorable(config_with(tiny, **SETTINGS[flag]))
    assert "Leave it out" in str(caught.value)


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
