"""The second tier of ``scripts/gpu_check.sh`` on a CPU: the same checks on vLLM's CPU runner, without graphs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.gpu_check.__main__ import main
from tests.support.tiny import TinyModel

pytestmark = pytest.mark.engine


@pytest.mark.slow
def test_the_engine_tier_holds_on_a_cpu(tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tier", "engine", "--device", "cpu", "--model", str(tiny.path), "--rounds", "0"]
    status = main([*arguments, "--out", str(tmp_path), "--name", "engine"])
    assert status == 0, capsys.readouterr().out
    content = json.loads((tmp_path / "engine.json").read_text())
    outcomes = {check["name"]: check["outcome"] for check in content["checks"]}
    skipped = {name for name, outcome in outcomes.items() if outcome == "skipped"}
    assert skipped == {"engine.v1.modes", "engine.throughput"}
    assert {name.removeprefix("engine.v1.") for name in outcomes.keys() - skipped} == {
        "runner", "fired", "positions", "parity.rows", "parity.sink", "parity.norms", "parity.can_fail", "mates",
    }  # fmt: skip


def test_an_engine_that_does_not_start_is_a_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    from serving.gpu_check import engine

    monkeypatch.setattr(engine.sys, "executable", "/bin/false")
    arguments = ["--tier", "engine", "--device", "cpu", "--model", str(tiny.path), "--rounds", "0"]
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    assert "FAILED engine.v1: GpuCheckError: the engine ended with status 1" in capsys.readouterr().out
