"""Detectors of replies, and of aggregates that no mean gives: what is calibrated is what is served."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from probes.artifact import Artifact
from probes.card import Format
from probes.fit.reading.scores import open_reader, read_scores, statistics_of_requests
from probes.fit.rows.dataset import build_dataset
from probes.fit.rows.example import Example
from probes.fit.rows.split import make_source_folds
from probes.fit.rows.wheels import WheelStore
from probes.fit.sources import SourceContext, parse_source
from probes.fit.training.recipe import RecipeError, read_recipe
from probes.fit.training.train import train
from probes.modelref import read_model_ref
from tests.support.words import WORDS

RECIPE = """
version: "1"
name: stealing
description: Mentions stealing.
seed: 1
stage: {stage}
training:
  positives: [{{kind: jsonl, path: rows.jsonl}}]
  negatives: [{{kind: jsonl, path: rows.jsonl}}]
  vary_form: 0.0
  small_talk: 0.0
  formats: [chat]
search:
  layers: {layers}
  aggregates: [{{kind: mean}}]
  fitters: [{{kind: logistic, inverse_penalty: 0.1}}]
  serve: {serve}
  {more}
calibration:
  held_out: 0.0
  benign: [{{kind: jsonl, path: benign.jsonl}}]
  formats: [chat]
  target_fpr: 0.05
development:
  apart:
    others: [{{kind: jsonl, path: others.jsonl}}]
    quiet: [{{kind: jsonl, path: quiet.jsonl}}]
"""


def write_rows(path: Path, count: int, seed: int, *, both: bool = True) -> None:
    generator = np.random.default_rng(seed)
    plain = [word for word in WORDS if word != "steal"]
    lines = []
    for i in range(count):
        reply = list(generator.choice(plain, int(generator.integers(4, 12))))
        label = int(both and i % 3 == 0)
        if label:
            reply[int(generator.integers(0, len(reply)))] = "steal"
        prompt = " ".join(generator.choice(plain, 5))
        lines.append(json.dumps({"prompt": prompt, "response": " ".join(reply), "label": label, "source": f"s{i % 2}"}))
    path.write_text("\n".join(lines))


def recipe_text(stage: str, serve: str, *, layers: str = "[1]", more: str = "") -> str:
    return RECIPE.format(stage=stage, serve=serve, layers=layers, more=more)


def trained(folder: Path, model_dir: Path, text: str) -> Artifact:
    for name, count, seed, both in (
        ("rows", 240, 0, True),
        ("others", 60, 1, True),
        ("benign", 90, 2, False),
        ("quiet", 40, 3, False),
    ):
        write_rows(folder / f"{name}.jsonl", count, seed, both=both)
    recipe = folder / "stealing.recipe.yaml"
    recipe.write_text(text)
    return train(
        recipe, model_dir=model_dir, model_id="t", out=folder, progress=lambda _: None, cache_dir=folder / "cache"
    )


def require_served(artifact: Artifact, folder: Path, model_dir: Path) -> None:
    """The largest benign statistics on the card are those of the artifact's own token scores."""
    (calibration,) = artifact.card.calibrations
    stage = calibration.stage
    store = WheelStore(folder=folder, progress=lambda _: None)
    benign = parse_source({"kind": "jsonl", "path": "benign.jsonl"}).load(
        SourceContext(wheels=store, folder=folder, seed=0)
    )
    model = read_model_ref(model_dir, model_id="t", dtype="float32", cache_dir=folder / "cache")
    reader = open_reader([artifact], model_dir, model=model, cache_dir=folder / "cache", progress=lambda _: None)
    (scores,) = read_scores(
        [artifact], benign, reader, text_format=Format.CHAT, stage=stage, cache_dir=folder, label="benign"
    )
    served = np.sort(statistics_of_requests(calibration.aggregate, stage, scores))[::-1]
    np.testing.assert_allclose(calibration.top_scores, served[: len(calibration.top_scores)], atol=2e-5)
    assert calibration.num_benign == len(benign)


@pytest.mark.parametrize(
    ("stage", "serve"),
    [
        ("response", "[]"),
        ("response", "[{kind: max}, {kind: topk, k: 3}]"),
        ("stream", "[]"),
        ("stream", "[{kind: rolling, window: 2}]"),
        ("prompt", "[{kind: logsumexp}]"),
    ],
)
def test_the_calibrated_statistic_is_the_served_one(model_dir: Path, tmp_path: Path, stage: str, serve: str) -> None:
    artifact = trained(tmp_path, model_dir, recipe_text(stage, serve))
    (calibration,) = artifact.card.calibrations
    assert calibration.stage == stage
    assert (calibration.aggregate.kind == "mean") == (serve == "[]")
    require_served(artifact, tmp_path, model_dir)
    apart = artifact.card.evaluation["chat"]["apart"]["others"]
    assert (apart["num_positive"], apart["num_negative"]) == (20, 40)
    fired = artifact.card.evaluation["chat"]["apart"]["quiet"]["at_threshold"]["fired_negative"]
    assert set(artifact.card.evaluation["chat"]["apart"]["quiet"]) == {"at_threshold"}, "one label has no AUROC"
    assert fired[1] == 40
    assert fired[0] <= 12
    if stage != "prompt":  # the word stands in the replies alone
        assert apart["probe"]["auroc"][0] > 0.8


@pytest.mark.parametrize(
    ("kind", "serve", "more"),
    [
        ("multimax", "[]", "token_fitters: [{kind: multimax, heads: 1, epochs: 20}]"),
        ("attention", "[{kind: max}]", "token_fitters: [{kind: attention, heads: 1, epochs: 20, learning_rate: 0.05}]"),
        ("ensemble", "[]", "ensembles: [2, 3]"),
        ("ensemble", "[{kind: max}]", "ensembles: [3]"),
    ],
)
def test_kinds_beside_linear_come_from_recipes(
    kind: str, serve: str, more: str, model_dir: Path, tmp_path: Path
) -> None:
    artifact = trained(tmp_path, model_dir, recipe_text("response", serve, layers="[0, 1, 2]", more=more))
    tried = [setting[0] for setting in artifact.card.training["search"]]
    # A single layer may be as good as several; what is asked for is tried, and what wins is served as it was measured.
    assert artifact.card.kind == kind or (kind == "ensemble" and any(isinstance(layers, list) for layers in tried))
    chosen = artifact.card.training["chosen"]["layer"]
    assert len(artifact.card.taps) == (len(chosen) if artifact.card.kind == "ensemble" else 1)
    require_served(artifact, tmp_path, model_dir)
    assert artifact.card.evaluation["chat"]["apart"]["others"]["probe"]["auroc"][0] > 0.9
    assert artifact.card.canary is not None


def test_what_is_fitted_on_whole_requests_is_not_judged_at_every_token(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe_text("stream", "[]", more="token_fitters: [{kind: attention}]"))
    with pytest.raises(RecipeError, match="leave them out, or say stage: response"):
        read_recipe(path)


def test_sets_are_held_out_as_a_whole() -> None:
    rows = [
        Example(text=f"{'word ' * (i % 5)}{source} {i}", label=i % 2, source=source, group=f"{source}/{i}")
        for source in ("a", "b")
        for i in range(40)
    ]
    rows += [Example(text=f"only {i}", label=0, source="benign", group=f"benign/{i}") for i in range(20)]
    folds = make_source_folds(rows, random.Random(0))  # noqa: S311 - seeded draws of examples
    assert [fold.name for fold in folds] == ["a", "b"]
    for fold in folds:
        assert {rows[i].source for i in fold.test} == {fold.name}
        assert fold.name not in {rows[i].source for i in fold.train}
        assert {rows[i].label for i in fold.train} == {0, 1} == {rows[i].label for i in fold.test}


def test_a_group_with_both_labels_stands_on_one_side(tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": f"{word} number {i} {j}", "label": label, "group": str(i)})
        for i in range(40)
        for j in range(3)
        for label, word in ((0, "bake"), (1, "steal"))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    text = recipe_text("prompt", "[]").replace("held_out: 0.0", "held_out: 0.3")
    text = text.replace("  benign: [{kind: jsonl, path: benign.jsonl}]\n", "").replace("others.jsonl", "none.jsonl")
    (tmp_path / "r.yaml").write_text(text.partition("development:")[0])
    store = WheelStore(folder=tmp_path, progress=lambda _: None)
    data = build_dataset(read_recipe(tmp_path / "r.yaml"), SourceContext(wheels=store, folder=tmp_path, seed=1))
    held = {row.group for row in data.calibration}
    assert held
    assert not held & {row.group for row in data.train}
    unseen = data.apart["unseen_groups"]
    assert {row.group for row in unseen} == held
    assert {row.label for row in unseen} == {0, 1}


def test_positives_without_a_partner_go_where_the_recipe_says_so(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"steal {'x' * (6 * i)}", "label": 1, "group": f"p{i}"}) for i in range(90)]
    lines += [json.dumps({"text": f"bake  {'y' * (6 * i)}", "label": 0, "group": f"n{i}"}) for i in range(45)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "benign.jsonl").write_text(json.dumps({"text": "now", "label": 0}))
    text = recipe_text("prompt", "[]").partition("development:")[0]
    text = text.replace("  vary_form: 0.0", "  general_negatives: 0.0\n  match_positives: true\n  vary_form: 0.0")
    (tmp_path / "r.yaml").write_text(text)
    store = WheelStore(folder=tmp_path, progress=lambda _: None)
    rows = build_dataset(read_recipe(tmp_path / "r.yaml"), SourceContext(wheels=store, folder=tmp_path, seed=1)).train
    positives = [len(row.text) for row in rows if row.label]
    assert 40 <= len(positives) <= 48
    assert max(positives) < 290
