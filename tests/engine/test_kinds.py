"""Every kind of detector, read by a real engine: its scores are those of transformers' activations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from probes.artifact import Artifact, save_artifact
from probes.card import Card, Format
from probes.modelref import read_model_ref
from probes.taps import Tap
from serving.deployment import deploy
from tests.support.kinds import AGGREGATE, LAYERS, MAKE
from tests.support.tiny import D_MODEL, TinyModel
from tests.support.words import activations_by_hooks

pytestmark = [pytest.mark.engine, pytest.mark.slow]
LENGTHS = (5, 40, 150)
NEW_TOKENS = 8


def save_kind(folder: Path, model: Path, kind: str) -> Artifact:
    rng = np.random.default_rng(sum(map(ord, kind)))
    card = Card(
        name=kind,
        kind=kind,
        description="made by a test",
        model=read_model_ref(model, model_id=model.name, dtype="float32"),
        taps=tuple(str(Tap(min(layer, 1))) for layer in LAYERS.get(kind, (0,))),
        formats=tuple(Format),
        skip_first=1,
        tensors_digest="0" * 64,
    )
    tensors = {name: np.asarray(value, dtype=np.float32) for name, value in MAKE[kind](rng, D_MODEL).items()}
    return save_artifact(folder / f"{kind}.safetensors", card, tensors)


def policy_of(folder: Path) -> Path:
    rules = []
    for kind in sorted(MAKE):
        aggregate = AGGREGATE.get(kind)
        config = ", ".join(f"{key}: {value}" for key, value in (aggregate.config() if aggregate else {}).items())
        when = (
            f"{{detector: {kind}, stage: prompt, aggregate: {{{config or 'kind: max'}}}, above: {{value: 1000000000}}}}"
        )
        rules.append(f"{{name: watch-{kind}, when: {when}, do: {{action: flag}}, mode: enforce}}")
    lines = "\n".join(f"      - {rule}" for rule in rules)
    entries = "\n".join(f"  - artifact: {kind}.safetensors" for kind in sorted(MAKE))
    path = folder / "telltale.yaml"
    path.write_text(
        f'version: "1"\ndetectors:\n{entries}\npolicies:\n  - name: default\n    on_gap: block\n'
        f"    on_uncalibrated: allow\n    rules:\n{lines}\n"
    )
    return path


def test_served_scores_are_the_offline_ones(tiny: TinyModel, tmp_path: Path) -> None:
    """Chunks of prompts and generated tokens, all kinds in one bank."""
    for kind in sorted(MAKE):
        save_kind(tmp_path, tiny.path, kind)
    policy = policy_of(tmp_path)
    generator = np.random.default_rng(11)
    prompts = [generator.integers(1000, 40000, size=length).tolist() for length in LENGTHS]
    engine = {
        "model": str(tiny.path), "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 268435456,
        "max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 64, "enable_prefix_caching": False,
    }  # fmt: skip
    order = {"policy": str(policy), "engine": engine, "runs": [prompts], "new_tokens": NEW_TOKENS}
    command = [sys.executable, "-m", "serving.engine.readings", str(tmp_path / "out.npz")]
    subprocess.run(command, input=json.dumps(order), text=True, check=True, cwd=Path(__file__).parents[2])
    bank = deploy(policy, model_dir=tiny.path, model_id=tiny.path.name, dtype="float32").plan.bank
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in MAKE}
    expected: dict[str, list[np.ndarray]] = {kind: [] for kind in MAKE}
    with np.load(tmp_path / "out.npz") as saved:
        for place, length in enumerate(LENGTHS):
            tokens, positions = saved[f"0.{place}.tokens"], saved[f"0.{place}.positions"]
            assert positions.tolist() == list(range(length + NEW_TOKENS - 1))
            served = bank.score(saved[f"0.{place}.readouts"])
            layers = activations_by_hooks(tiny.path, tokens[:-1].tolist())
            streams = {Tap(number): rows for number, rows in enumerate(layers)}
            for kind in MAKE:
                detector = bank.detector(kind)
                first = bank.index[kind]
                found[kind].append(served[1:, first : first + detector.channels])
                offline = detector.score(detector.read(streams)).reshape(len(positions), -1)
                expected[kind].append(offline[1:])
    for kind in MAKE:
        ours, theirs = np.concatenate(found[kind]), np.concatenate(expected[kind])
        for channel in range(ours.shape[1]):
            difference = np.abs(ours[:, channel] - theirs[:, channel]).max()
            assert difference <= 1e-3 * max(1.0, float(theirs[:, channel].std())), (kind, channel)
            assert spearmanr(ours[:, channel], theirs[:, channel]).statistic >= 0.999, (kind, channel)
