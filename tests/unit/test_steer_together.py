"""Steers of a policy file, measured together: a clamped latent does what was planted, and random directions do not."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from typer.testing import CliRunner

from probes.fit.steer.scaled import scaled
from probes.steering import Operator, Update, Vector
from probes.steering.ablate import Ablate
from probes.steering.add import Add
from probes.steering.cap import Cap
from serving.cli import app
from tests.support.planted import WORD, PlantedModel, make_planted_model
from tests.support.sae_tiny import LENGTH, MEDIAN, SILENT, TRIGGER, sae_for_tiny
from tests.support.tiny import save_trigger

TARGET = 100.0
POLICY = f"""\
version: "1"
detectors:
  - artifact: trigger.safetensors
steers:
  - {{name: say, sae: sae.safetensors, latent: {TRIGGER}, op: set_latent, target: {TARGET}, more_is: neutral,
     max_dose: 2}}
  - {{name: quiet, sae: sae.safetensors, latent: {SILENT}, op: cap_latent, ceiling: 1.0, more_is: neutral}}
policies:
  - name: default
    on_gap: flag
    on_uncalibrated: flag
    steers: [say, quiet]
    rules:
      - {{name: watch, when: {{detector: trigger, stage: prompt}}, do: {{action: flag}}, mode: enforce}}
"""


@given(
    operator=st.sampled_from([Add(strength=0.1), Ablate(strength=0.5), Cap(strength=0.25)]),
    factor=st.floats(0.1, 4),
    seed=st.integers(0, 100),
)
def test_what_is_written_is_multiplied_and_the_limit_stays(operator: Operator, factor: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=8)
    vector = Vector(direction / np.linalg.norm(direction), median_norm=4.0, mean=0.3, ceiling=0.5)
    update = operator.update(vector, max_dose=0.2)
    rows = rng.normal(size=(30, 8)) * 3
    free = Update(**{**{f: getattr(update, f) for f in Update.__slots__}, "limit": 1e9})
    wanted = np.clip(free.coefficient(rows) * factor, -update.limit, update.limit)
    np.testing.assert_allclose(scaled(update, factor).coefficient(rows), wanted)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> PlantedModel:
    return make_planted_model(tmp_path_factory.mktemp("together") / "tiny-llama")


@pytest.fixture
def line(planted: PlantedModel, tmp_path: Path) -> list[str]:
    """The command, but for the names of steers."""
    save_trigger(tmp_path / "trigger.safetensors", planted.tiny.path)
    sae_for_tiny(planted.tiny, tmp_path / "sae.safetensors")
    (tmp_path / "telltale.yaml").write_text(POLICY)
    words = ["river", "house", "winter", "paper", "engine", "garden", "letter", "window"]
    pairs = [
        {"positive": f"{words[n % 8]}{WORD}{WORD} {n}", "negative": f"{words[n % 8]} {words[(n + 3) % 8]} {n}"}
        for n in range(20)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"Tell me about {w}"}) for w in words))
    paths = ["--prompts", str(tmp_path / "prompts.jsonl"), "--examples", str(tmp_path / "pairs.jsonl")]
    sizes = ["--max-tokens", "4", "--seeds", "1", "--neutral-lines", "2", "--strengths", "0.001,1"]
    rest = ["--instruction", f"Say{WORD}.", "--model", str(planted.tiny.path), "--report", str(tmp_path / "report")]
    return ["steer", "together", str(tmp_path / "telltale.yaml"), *paths, *sizes, *rest]


def test_a_clamped_latent_does_what_was_planted(line: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*line, "--steers", "say,quiet"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "report" / "together.json").read_text())
    weak, strong = told["steered"]
    assert weak["target"][0] < 0.5
    assert strong["target"][0] > 0.9
    assert strong["target"][0] > told["random"][1]["target"][0] + 0.3
    # The latent that is never active has nothing to be capped; every row is brought to the target of the other.
    assert strong["dose"] == pytest.approx(TARGET * LENGTH / MEDIAN, rel=0.02)
    assert told["random"][1]["dose"] == pytest.approx(strong["dose"], rel=0.02)
    assert "| **steer** | 1 |" in done.output
    assert "`say`: `set_latent` latent 5" in (tmp_path / "report" / "together.md").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steers", "says"], "no steer 'says'. Did you mean 'say'"),
        (["--steers", ","], "name at least one"),
        (["--steers", "say", "--strengths", "0,1"], "above 0"),
        (["--steers", "say", "--strengths", "a"], "numbers with commas"),
    ],
)
def test_what_cannot_be_measured_is_refused(line: list[str], more: list[str], said: str) -> None:
    done = CliRunner().invoke(app, [*line, *more])
    assert done.exit_code != 0
    assert said in done.output + str(done.exception)
