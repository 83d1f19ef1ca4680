"""The causal level of a detector: found where it was planted, not found where nothing was."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probes.artifact import Artifact, write_card
from probes.card import Format
from probes.fit.steer.causal import CARD_KEY, CausalFindings, CausalTest, Level, level_of, measure_causal, predictive
from probes.fit.steer.causal_cases import Case, CausalError, read_cases
from probes.taps import Site
from serving.commands.steer import causal
from tests.support.planted import OTHER, WORD, PlantedModel, make_planted_model
from tests.support.tiny import D_MODEL, save_linear

WORDS = ["river", "house", "winter", "paper", "engine", "garden"]
DIRECTIONS = 99


def comparison(probe: float, text: float) -> dict[str, Any]:
    return {
        "probe": {"auroc": [probe + 0.05, probe, probe + 0.08]},
        "tf_idf": {"auroc": [text, text - 0.05, text + 0.05]},
        "length_only": {"auroc": [0.55, 0.5, 0.6]},
    }


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> PlantedModel:
    return make_planted_model(tmp_path_factory.mktemp("causal") / "tiny-llama")


@pytest.fixture(scope="module")
def cases(planted: PlantedModel) -> tuple[Case, ...]:
    """Prompts that end with the trigger, whose mark WORD's logit reads, and prompts that do not."""
    trigger = planted.tiny.trigger_text
    prompts = [(f"{word}{trigger}", 1) for word in WORDS] + [(f"{word} {word}", 0) for word in WORDS]
    assert all(planted.model.text(text)[-1] == planted.tiny.trigger for text, label in prompts if label)
    return tuple(Case(prompt=text, target=WORD, other=OTHER, label=label) for text, label in prompts)


def detector(planted: PlantedModel, path: Path, direction: np.ndarray, **settings: Any) -> Artifact:
    artifact = save_linear(path, planted.tiny.path, name="probe", direction=direction, formats=("raw",), **settings)
    evaluation = {"raw": {"pairs": comparison(0.9, 0.7)}, "other": {"kept": True}}
    write_card(path, artifact.card.model_copy(update={"evaluation": evaluation}))
    return Artifact.load(path)


def measured(planted: PlantedModel, cases: tuple[Case, ...], artifact: Artifact, **settings: Any) -> CausalFindings:
    defaults: dict[str, Any] = {"strength": 0.1, "directions": DIRECTIONS, "neutral_lines": 1, "seed": 0}
    return measure_causal(
        artifact,
        cases,
        model_dir=planted.tiny.path,
        model=planted.model,
        created_by="test",
        progress=lambda text: None,
        **(defaults | settings),
    )


def test_a_planted_direction_is_necessary_and_sufficient(
    planted: PlantedModel, cases: tuple[Case, ...], tmp_path: Path
) -> None:
    # Length and bias of a detector say nothing of its direction.
    artifact = detector(planted, tmp_path / "probe.safetensors", 7 * planted.direction, canary=True, bias=-2.0)
    found = measured(planted, cases, artifact)
    assert found.level is not None
    assert found.level >= Level.SUFFICIENT
    assert found.necessary.p == found.sufficient.p == pytest.approx(1 / (1 + DIRECTIONS))
    assert found.necessary.effect > 3 * max(map(abs, found.necessary.null))
    assert len(found.necessary.null) == len(found.kl.null) == DIRECTIONS

    tensors = artifact.path.read_bytes()
    found.write_card(artifact)
    loaded = Artifact.load(artifact.path)
    assert artifact.path.read_bytes() == tensors
    assert loaded.card.canary is not None
    assert loaded.card.canary == artifact.card.canary
    assert loaded.card.calibrations == artifact.card.calibrations
    assert loaded.card.evaluation["other"] == {"kept": True}
    assert loaded.card.evaluation[CARD_KEY] == json.loads(json.dumps(found.as_dict()))
    assert loaded.card.evaluation[CARD_KEY]["level"] == f"L{found.level.value}"


def test_a_random_detector_is_no_more_than_predictive(
    planted: PlantedModel, cases: tuple[Case, ...], tmp_path: Path
) -> None:
    direction = np.random.default_rng(100).standard_normal(D_MODEL)
    direction[0] = 0
    found = measured(planted, cases, detector(planted, tmp_path / "probe.safetensors", direction))
    assert found.necessary.p > 0.01
    assert found.sufficient.p > 0.01
    assert found.level is Level.BEYOND_TEXT


def test_p_counts_the_random_directions_that_do_as_much() -> None:
    null = tuple(float(value) for value in range(100))
    assert CausalTest(100.0, null).p == pytest.approx(1 / 101)
    assert CausalTest(99.0, null).p == pytest.approx(2 / 101)
    assert CausalTest(-1.0, null).p == 1


@pytest.mark.parametrize("held", list(product([False, True], repeat=5)))
def test_a_level_asks_for_all_below_it(held: tuple[bool, ...]) -> None:
    expected = next((number for number, holds in enumerate(held) if not holds), 5) - 1
    found = level_of(dict(zip(Level, held, strict=True)))
    assert found == (None if expected < 0 else Level(expected))


@pytest.mark.parametrize(
    ("evaluation", "expected"),
    [
        ({}, (False, False)),
        ({"chat": {"pairs": comparison(0.9, 0.7)}}, (False, False)),
        ({"raw": {"pairs": comparison(0.45, 0.3)}}, (False, False)),
        ({"raw": {"pairs": comparison(0.6, 0.7)}}, (True, False)),
        ({"raw": {"pairs": comparison(0.9, 0.7)}}, (True, True)),
        ({"raw": {"pairs": comparison(0.52, 0.4)}}, (True, False)),  # length alone does better
        ({"raw": {"pairs": comparison(0.9, 0.7), "pairs_length_matched": comparison(0.6, 0.7)}}, (True, False)),
    ],
)
def test_what_is_predictive_stands_on_the_card(evaluation: dict[str, Any], expected: tuple[bool, bool]) -> None:
    assert predictive(evaluation, Format.RAW) == expected


def test_what_cannot_be_measured_is_refused(planted: PlantedModel, cases: tuple[Case, ...], tmp_path: Path) -> None:
    artifact = detector(planted, tmp_path / "probe.safetensors", planted.direction)
    with pytest.raises(CausalError, match="with fewer than 99 no p reaches"):
        measured(planted, cases, artifact, directions=98)
    other_site = detector(planted, tmp_path / "site.safetensors", planted.direction, site=Site.MLP_OUT)
    with pytest.raises(CausalError, match="of linear detectors of the residual stream"):
        measured(planted, cases, other_site)


LINE = {"prompt": "a", "target": "b", "other": "c", "label": 1}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([{**LINE, "label": 2}], "pairs.jsonl:1: not of the form"),
        ([{**LINE, "target": ""}], "pairs.jsonl:1: not of the form"),
        ([LINE, {"prompt": "a"}], "pairs.jsonl:2: not of the form"),
        ([LINE] * 8, "0 cases of label 0; at least 4"),
        ([{**LINE, "label": n // 5} for n in range(8)], "3 cases of label 1"),
    ],
)
def test_cases_that_cannot_be_read_are_refused(tmp_path: Path, lines: list[dict[str, Any]], said: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(CausalError, match=said):
        read_cases(path)


def test_the_command_writes_card_and_figures(
    planted: PlantedModel, cases: tuple[Case, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = detector(planted, tmp_path / "probe.safetensors", planted.direction)
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "out" / "probe.json"
    pairs.write_text("\n".join(case.model_dump_json() for case in cases))
    settings: dict[str, Any] = {
        "pairs": pairs,
        "model": str(planted.tiny.path),
        "strength": 0.1,
        "directions": DIRECTIONS,
        "neutral_lines": 1,
        "out": out,
    }
    causal(artifact.path, card=False, **settings)
    assert CARD_KEY not in Artifact.load(artifact.path).card.evaluation
    level = json.loads(out.read_text())["level"]
    assert f"level: {level}" in capsys.readouterr().err
