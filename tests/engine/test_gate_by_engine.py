"""``telltale gate`` on activations that the serving engine computed: of the same build, and of a changed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from probes.card import Stage
from serving.bench.rebuilds import rebuild, rounded
from tests.support.tiny import TinyModel, save_trigger

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PASS, DEGRADED = 0, 11
WORDS = ["river", "stone", "lantern", "harvest", "copper", "meadow", "winter", "signal", "garden", "paper"]
ENGINE = (
    "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "134217728", "--max-model-len", "512",
    "--max-num-seqs", "32", "--max-num-batched-tokens", "256",
)  # fmt: skip


def telltale(*words: object, folder: Path, code: int = 0) -> str:
    command = [sys.executable, "-m", "serving.cli", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TELLTALE_CACHE": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def write_rows(path: Path, model: TinyModel) -> Path:
    """150 rows that say the planted word, 400 that do not."""
    rng = np.random.default_rng(5)
    lines = []
    for number in range(550):
        words = [f" {word}" for word in rng.choice(WORDS, int(rng.integers(4, 16)))]
        if label := int(number < 150):
            words[int(rng.integers(len(words)))] = model.trigger_text
        lines.append(json.dumps({"text": "".join(words).strip() + f" {number}", "label": label, "group": str(number)}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def forgetful(trigger: int) -> Any:
    """A change of the weights: the planted token says nothing any more."""

    def change(model: Any) -> None:
        with torch.no_grad():
            model.model.embed_tokens.weight[trigger, 0] = 0.0

    return change


@pytest.mark.timeout(900)  # three engines start
def test_the_engines_own_activations_are_checked(tiny: TinyModel, tmp_path: Path) -> None:
    artifact = save_trigger(tmp_path / "trigger.safetensors", tiny.path, stages=(Stage.PROMPT,))
    rows = write_rows(tmp_path / "rows.jsonl", tiny)
    builds = {
        "old": tiny.path,
        "near": rebuild(tiny.path, tmp_path / "near-build", rounded),
        "far": rebuild(tiny.path, tmp_path / "far-build", forgetful(tiny.trigger)),
    }
    tap = artifact.card.taps[0]
    for name, model in builds.items():
        chosen = ("--taps", tap, "--positions", "all", "--model", model)
        telltale("collect", rows, "--out", tmp_path / name, *chosen, *ENGINE, folder=tmp_path)

    def record(out: str, *source: object) -> Path:
        telltale("gate", "record", artifact.path, "--data", rows, *source, "--out", tmp_path / out, folder=tmp_path)
        return tmp_path / out

    by_engine = record("engine.json", "--activations", tmp_path / "old")
    by_transformers = record("transformers.json", "--model", tiny.path)
    found, expected = (json.loads(path.read_text())["statistics"] for path in (by_engine, by_transformers))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert max(found) > 1.0

    def check(reference: Path, build: str, code: int) -> dict[str, Any]:
        out = tmp_path / f"{build}.report.json"
        source = ("--reference", reference, "--activations", tmp_path / build, "--out", out)
        telltale("gate", "check", artifact.path, "--data", rows, *source, folder=tmp_path, code=code)
        return dict(json.loads(out.read_text()))

    check(by_engine, "old", PASS)
    check(by_transformers, "old", PASS)
    near = check(by_engine, "near", PASS)
    assert near["decision"]["verdict"] == "PASS"
    far = check(by_engine, "far", DEGRADED)
    assert far["decision"]["verdict"] == "DEGRADED"

    # What was collected of other rows is no answer about these.
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(rows.read_text(encoding="utf-8").splitlines()[1:]), encoding="utf-8")
    telltale(
        "gate", "check", artifact.path, "--reference", by_engine, "--data", other, "--activations", tmp_path / "old",
        folder=tmp_path, code=2,
    )  # fmt: skip
