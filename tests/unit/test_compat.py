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


def test_a_changed_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = dataclasses.replace(TOUCHPOINTS[0], sha256="0" * 16)
    missing = dataclasses.replace(TOUCHPOINTS[1], name="Scheduler.no_such_method")
    monkeypatch.setattr(compat, "TOUCHPOINTS", (changed, missing, *TOUCHPOINTS[2:]))
    assert compat.drifted() == [changed, missing]
    with pytest.raises(CompatError, match=r"no_such_method.*Reinstall"):
        compat.require_touchpoints()


def test_every_overridden_method_has_its_touchpoint() -> None:
    from serving.engine.blocks import MonitoredKVCacheManager
    from serving.engine.runner_v1 import TappedRunner
    from serving.engine.scheduler import MonitoredScheduler

    known = {point.name.split(".")[-1] for point in TOUCHPOINTS}
    for cls in (MonitoredScheduler, TappedRunner, MonitoredKVCacheManager):
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
