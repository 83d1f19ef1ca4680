"""No server without our HTTP layers, whatever keeps vLLM from loading them; with vLLM's own loader."""

from __future__ import annotations

import sys

import pytest
from vllm.plugins import load_endpoint_plugins

from serving.engine.endpoints import OURS, UnguardedError, require_ours
from serving.engine.launch import ENTRY_POINTS
from serving.engine.runtime import CONFIG_VARIABLE

load = require_ours(load_endpoint_plugins)


@pytest.fixture(autouse=True)
def _monitored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_VARIABLE, "policy.yaml")
    monkeypatch.setenv("VLLM_PLUGINS", f"telltale,{OURS}")


def test_ours_is_loaded() -> None:
    assert [plugin.name for plugin in load(("generate",))] == [OURS]
    assert ENTRY_POINTS["vllm.endpoint_plugins"] == OURS


def test_one_that_cannot_be_imported_is_the_end_and_not_a_line_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "serving.api.plugin", None)
    assert load_endpoint_plugins(("generate",)) == []
    with pytest.raises(UnguardedError, match="VLLM_PLUGINS"):
        load(("generate",))


@pytest.mark.parametrize("named", ["telltale", "", None])
def test_one_that_is_not_named_is_the_end_too(monkeypatch: pytest.MonkeyPatch, named: str | None) -> None:
    if named is None:
        monkeypatch.delenv("VLLM_PLUGINS")
    else:
        monkeypatch.setenv("VLLM_PLUGINS", named)
    with pytest.raises(UnguardedError, match=OURS):
        load(("generate",))


def test_where_nothing_is_monitored_or_generated_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert load(("render",)) == []
    monkeypatch.delenv(CONFIG_VARIABLE)
    assert load(("generate",)) == []
