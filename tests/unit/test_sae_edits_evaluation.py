"""Edits of several latents together: what is measured is their sum, beside random directions with the same doses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from probes.fit.steer.behaviour import Judge, read_examples
from probes.fit.steer.joint import join
from probes.fit.steer.joint_evaluation import JointEvaluation, write_joint_report
from probes.fit.steer.trial import EvalError, Trial
from probes.fit.steer.verdict import Grade
from probes.sae.edits import Edit, EditKind
from probes.sae.edits_evaluation import evaluate_edits, joint_edits
from probes.sae.file import SaeFile
from probes.sae.sae import Activation
from probes.steering import SteerError
from probes.steering.steer import Positions
from serving.cli import app
from tests.support.planted import WORD, PlantedModel, make_planted_model
from tests.support.sae_tiny import LENGTH, MEDIAN, SILENT, TRIGGER, sae_for_tiny
from tests.unit.artifacts import D_MODEL
from tests.unit.saes import WIDTH, random_sae, stored_sae

FREE = Trial(prompts=("a",), instruction="b", max_dose=1000.0, positions=Positions.ALL)


@given(
    seed=st.integers(0, 10_000),
    raised=st.sets(st.integers(0, WIDTH // 2 - 1), min_size=1, max_size=3),
    reduced=st.sets(st.integers(WIDTH // 2, WIDTH - 1), min_size=1, max_size=3),
    strength=st.floats(0.2, 3),
)
def test_edits_together_are_the_decoded_change_of_all_codes(
    seed: int, raised: set[int], reduced: set[int], strength: float
) -> None:
    sae = random_sae(seed, activation=Activation.RELU)
    rows = np.random.default_rng(seed).normal(size=(40, D_MODEL)) * 3
    edits = [Edit(EditKind.RAISE, latent, 2.0, 0.1) for latent in sorted(raised)]
    edits += [Edit(EditKind.REDUCE, latent, 1.5, 0.1) for latent in sorted(reduced)]
    together = joint_edits("all", stored_sae(sae), edits, FREE, strength)
    codes = sae.encode(rows).astype(np.float64)
    wanted = codes.copy()
    up, down = sorted(raised), sorted(reduced)
    wanted[:, up] = np.maximum(codes[:, up], 2.0 * strength)
    wanted[:, down] = np.maximum(codes[:, down] - 1.5 * strength, 0.0)
    change = (wanted - codes) @ sae.decoder.astype(np.float64)
    found, dose = together.update.apply(rows, np.ones(40, dtype=bool))
    np.testing.assert_allclose(found, rows + change, atol=2e-3)
    np.testing.assert_allclose(dose, np.linalg.norm(change, axis=1), atol=2e-3)
    # Written to nobody else, and the control moves each row as far, along one line.
    where = np.arange(40) % 2 == 0
    assert np.array_equal(together.update.apply(rows, where)[0][~where], rows[~where])
    moved, random_dose = together.at_random(np.random.default_rng(1)).update.apply(rows, where)
    np.testing.assert_allclose(random_dose, np.where(where, dose, 0.0))
    np.testing.assert_allclose(np.linalg.norm(moved - rows, axis=1), random_dose, atol=1e-9)
    assert np.linalg.matrix_rank(moved - rows, tol=1e-6) <= 1


def test_steers_that_are_not_written_together_are_refused() -> None:
    sae = stored_sae(random_sae(0))
    one, other = (
        joint_edits("x", sae, [Edit(EditKind.REDUCE, 1, 1.0, 0.1)], trial, 1.0).first
        for trial in (FREE, Trial(prompts=("a",), instruction="b", max_dose=1000.0))
    )
    with pytest.raises(SteerError, match="different rows"):
        join("both", [one, other], strength=1.0)
    with pytest.raises(SteerError, match="no steer"):
        join("none", [], strength=1.0)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> PlantedModel:
    return make_planted_model(tmp_path_factory.mktemp("edits") / "tiny-llama")


def pairs(path: Path) -> Path:
    words = ["river", "house", "winter", "paper", "engine", "garden", "letter", "window"]
    lines = [
        {"positive": f"{words[n % 8]}{WORD}{WORD} {n}", "negative": f"{words[n % 8]} {words[(n + 3) % 8]} {n}"}
        for n in range(20)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


EDITS = [Edit(EditKind.RAISE, TRIGGER, 100.0, 0.5), Edit(EditKind.REDUCE, SILENT, 5.0, 0.5)]


@pytest.fixture(scope="module")
def file(planted: PlantedModel, tmp_path_factory: pytest.TempPathFactory) -> SaeFile:
    return sae_for_tiny(planted.tiny, tmp_path_factory.mktemp("file") / "sae.safetensors")


@pytest.fixture(scope="module")
def measured(planted: PlantedModel, file: SaeFile, tmp_path_factory: pytest.TempPathFactory) -> JointEvaluation:
    """The latent whose decoder row is the planted direction is raised; one that is never active is reduced."""
    folder = tmp_path_factory.mktemp("measured")
    trial = Trial(
        prompts=tuple(f"Tell me about {word}" for word in ("rain", "bread", "stone", "trees")),
        instruction=f"Say{WORD}.",
        max_tokens=4,
        seeds=2,
        neutral_lines=2,
    )
    judge = Judge.fit(read_examples(pairs(folder / "pairs.jsonl")), seed=0)
    return evaluate_edits(
        "planted", file, EDITS, trial, (0.001, 1.0), judge=judge, model=planted.model, progress=lambda _: None
    )


def test_the_planted_behaviour_is_found_at_the_level_that_makes_it(measured: JointEvaluation) -> None:
    weak, strong = measured.response.steered
    assert strong.figures.target.value > 0.9
    assert strong.figures.target.value > measured.response.random[1].figures.target.value + 0.3
    assert weak.figures.gain.value < 0.1
    assert strong.figures.dose == pytest.approx(100.0 * LENGTH / MEDIAN, rel=1e-3)
    assert strong.figures.dose == pytest.approx(measured.response.random[1].figures.dose, rel=1e-3)
    assert strong.figures.kl is not None
    assert weak.figures.kl is not None
    assert weak.figures.kl < 1e-3
    assert strong.figures.kl > 1.0
    # One word again and again: it works, and the text falls apart.
    assert strong.figures.distinct_2 < 0.8 * measured.response.plain.figures.distinct_2
    assert measured.verdict.grade is Grade.REJECT
    assert "degenerates" in " ".join(measured.verdict.reasons)


def test_the_report_holds_the_table_and_the_figures(measured: JointEvaluation, tmp_path: Path) -> None:
    path = write_joint_report(measured, tmp_path / "report", command="telltale sae edits ...")
    text = path.read_text()
    assert text.count("| **steer** |") == 2
    assert text.count("| random |") == 2
    assert "`raise_latent` 5 of planted, level 100" in text
    told = json.loads(path.with_suffix(".json").read_text())
    assert told["verdict"] == "reject"
    assert [condition["strength"] for condition in told["steered"]] == [0.001, 1.0]


def test_strengths_that_write_nothing_are_refused(
    measured: JointEvaluation, file: SaeFile, planted: PlantedModel
) -> None:
    for strengths in ((), (1.0, 0.0)):
        with pytest.raises(EvalError, match="above 0"):
            evaluate_edits(
                "none",
                file,
                EDITS,
                measured.trial,
                strengths,
                judge=measured.judge,
                model=planted.model,
                progress=lambda _: None,
            )


def test_prompts_and_instruction_stand_together(tmp_path: Path, file: SaeFile) -> None:
    line = ["sae", "edits", str(file.path), "--pairs", str(pairs(tmp_path / "p.jsonl")), "--name", "x"]
    found = CliRunner().invoke(app, [*line, "--more-is", "neutral", "--prompts", "p.jsonl"])
    assert found.exit_code != 0
    assert "stand together" in str(found.exception) + found.output
