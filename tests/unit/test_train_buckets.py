"""Thresholds by length from a recipe: as `telltale calibrate` sets them, and only where the recipe asks for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import probes.packs
from probes.artifact import Artifact
from probes.card import Calibration, Stage
from probes.fit.calibration.calibrate import Promise
from probes.fit.calibration.calibrator import Calibrator
from probes.fit.evaluation.evaluate import limits_of
from probes.fit.reading.scores import open_reader, read_scores, statistics_of_requests
from probes.fit.rows.dataset import build_dataset
from probes.fit.rows.wheels import WheelStore
from probes.fit.sources import SourceContext
from probes.fit.sources.jsonl import read_jsonl
from probes.fit.training.recipe import Recipe, read_recipe
from probes.fit.training.train import train
from tests.support.words import WORDS

RECIPE = """\
version: "1"
name: stealing
description: Mentions stealing.
training:
  positives: [{{kind: jsonl, path: rows.jsonl}}]
  negatives: [{{kind: jsonl, path: rows.jsonl}}]
  formats: [raw]
search:
  layers: [1]
  aggregates: [{{kind: mean}}]
  serve: [{{kind: {served}}}]
  fitters: [{{kind: logistic, inverse_penalty: 0.1}}]
calibration: {{held_out: 0.5, target_fpr: 0.05, formats: [raw]{more}}}
development:
  pairs: [{{kind: jsonl, path: development.jsonl}}]
"""


def write_rows(path: Path, count: int, seed: int) -> None:
    """Texts of 4 to 60 words, of which every fourth holds the word."""
    rng = np.random.default_rng(seed)
    plain = [word for word in WORDS if word != "steal"]
    lines = []
    for number in range(count):
        words = list(rng.choice(plain, int(rng.integers(4, 60))))
        if number % 4 == 0:
            words[int(rng.integers(len(words)))] = "steal"
        lines.append(json.dumps({"text": " ".join(words), "label": int(number % 4 == 0)}))
    path.write_text("\n".join(lines), encoding="utf-8")


def trained(model_dir: Path, folder: Path, *, served: str = "max", more: str = "") -> tuple[Artifact, Path]:
    write_rows(folder / "rows.jsonl", 1200, 0)
    write_rows(folder / "development.jsonl", 200, 1)
    recipe = folder / "stealing.recipe.yaml"
    recipe.write_text(RECIPE.format(served=served, more=more))
    cache = folder / "cache"
    made = train(recipe, model_dir=model_dir, model_id="w", out=folder, progress=lambda _: None, cache_dir=cache)
    return made, recipe


def test_a_recipe_gets_what_calibrate_would_set(model_dir: Path, tmp_path: Path) -> None:
    plain, _ = trained(model_dir, tmp_path)
    assert plain.card.calibrations[0].buckets == ()
    assert "buckets" not in plain.card.training["recipe"]["calibration"]

    made, recipe_path = trained(model_dir, tmp_path, more=", buckets: auto")
    (calibration,) = made.card.calibrations
    assert len(calibration.buckets) >= 3
    assert all(bucket.certified for bucket in calibration.buckets)
    assert calibration.buckets[0].threshold < calibration.buckets[-1].threshold
    assert made.card.training["recipe"]["calibration"]["buckets"] == "auto"
    assert set(made.tensors) == set(plain.tensors)
    for name, tensor in plain.tensors.items():
        np.testing.assert_array_equal(made.tensors[name], tensor)
    assert plain.card.calibrations[0] == calibration.model_copy(update={"buckets": ()})

    recipe = read_recipe(recipe_path)
    wheels = WheelStore(folder=tmp_path / "wheels", progress=lambda _: None)
    rows = build_dataset(recipe, SourceContext(wheels=wheels, folder=tmp_path, seed=recipe.seed)).calibration
    reader = open_reader([made], model_dir, model=made.card.model, cache_dir=tmp_path, progress=lambda _: None)
    again = Calibrator(reader=reader, cache_dir=tmp_path, stage=Stage.PROMPT)
    ((expected,),) = again.run([made], [Promise(target_fpr=0.05)], rows)
    assert shape(calibration) == shape(expected)
    np.testing.assert_allclose(
        [bucket.threshold for bucket in calibration.buckets],
        [bucket.threshold for bucket in expected.buckets],
        rtol=1e-4,
    )

    # What the card says of the development rows are these thresholds, each for its lengths.
    examples = read_jsonl(tmp_path / "development.jsonl")
    (scores,) = read_scores(
        [made], examples, reader, text_format=calibration.format, stage=Stage.PROMPT, cache_dir=tmp_path, label="x"
    )
    fired = statistics_of_requests(calibration.aggregate, Stage.PROMPT, scores) > limits_of(
        calibration, [len(request.scores) for request in scores]
    )
    report = made.card.evaluation["raw"]["at_threshold"]
    assert report["by_length"] is True
    harmless = np.array([row.label == 0 for row in examples])
    assert report["pairs"]["fired_negative"] == [int(fired[harmless].sum()), int(harmless.sum())]


def shape(calibration: Calibration) -> list[tuple[int | None, int]]:
    return [(bucket.max_tokens, bucket.num_benign) for bucket in calibration.buckets]


def test_a_statistic_that_does_not_grow_has_one_threshold(model_dir: Path, tmp_path: Path) -> None:
    made, _ = trained(model_dir, tmp_path, served="last", more=", buckets: auto")
    assert made.card.calibrations[0].buckets == ()
    assert "by_length" not in made.card.evaluation["raw"]["at_threshold"]


RECIPES = sorted(Path(probes.packs.__file__).parent.glob("*/*.recipe.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.name))
def test_the_pack_is_recorded_as_it_was(path: Path) -> None:
    """A recipe that does not ask for them is recorded without a word of them, and reads back the same."""
    recipe = read_recipe(path)
    recorded = recipe.model_dump(mode="json")
    assert "buckets" not in recorded["calibration"]
    assert Recipe.model_validate_json(json.dumps(recorded)) == recipe
