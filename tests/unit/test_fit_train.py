"""The whole way from a recipe to a served score, on a tiny random model that is made here."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from monitor.canary import CanaryFailure, CanaryPrompt, Expected
from probes.aggregate import parse_aggregator
from probes.artifact import Artifact, write_card
from probes.card import Format
from probes.detectors import load_detector
from probes.fit.evaluation.text_encoder import InputEmbeddings
from probes.fit.reading.activations import ActivationError, ActivationReader
from probes.fit.reading.weights import WeightsError, score_weights
from probes.fit.rows.example import Example
from probes.fit.training.canary import canary_of
from probes.fit.training.recipe import RecipeError, read_recipe
from probes.fit.training.train import train
from probes.modelref import read_model_ref
from probes.taps import Site
from tests.support.words import WORDS, activations_by_hooks

LINEAR_AGGREGATES = (
    {"kind": "last"},
    {"kind": "mean"},
    {"kind": "rolling", "window": 6},
    {"kind": "ema", "alpha": 0.12},
)
RECIPE = """
version: "1"
name: stealing
description: Mentions stealing.
seed: 1
training:
  positives: [{kind: jsonl, path: rows.jsonl}]
  negatives: [{kind: jsonl, path: rows.jsonl}]
  formats: [chat, raw]
search:
  layers: [0, 2]
  aggregates: [{kind: last}, {kind: rolling, window: 4}, {kind: ema, alpha: 0.3}]
  fitters: [{kind: logistic, inverse_penalty: 0.01}, {kind: logistic, inverse_penalty: 0.1}]
calibration:
  held_out: 0.3
  formats: [chat, raw]
  target_fpr: 0.05
development:
  pairs: [{kind: jsonl, path: development.jsonl}]
"""


def sentences(count: int, seed: int) -> list[dict[str, object]]:
    generator = np.random.default_rng(seed)
    plain = [word for word in WORDS if word != "steal"]
    lines: list[dict[str, object]] = []
    for i in range(count):
        words = list(generator.choice(plain, 8))
        if i % 4 == 0:
            words[int(generator.integers(5, 8))] = "steal"
        lines.append({"text": " ".join(words), "label": int(i % 4 == 0)})
    return lines


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for name, count, seed in (("rows", 900, 0), ("development", 160, 1)):
        text = "\n".join(json.dumps(row) for row in sentences(count, seed))
        (tmp_path / f"{name}.jsonl").write_text(text)
    path = tmp_path / "stealing.recipe.yaml"
    path.write_text(RECIPE)
    return path


def reader_of(model_dir: Path, cache: Path, layers: list[int], site: Site = Site.RESID_POST) -> ActivationReader:
    model = read_model_ref(model_dir, model_id="tiny", dtype="float32", cache_dir=cache)
    return ActivationReader(model_dir, model=model, layers=layers, site=site, cache_dir=cache, progress=lambda _: None)


def test_train_and_serve(model_dir: Path, recipe: Path, tmp_path: Path) -> None:
    lines: list[str] = []

    def trained(folder: str) -> Artifact:
        return train(
            recipe,
            model_dir=model_dir,
            model_id="tiny",
            out=tmp_path / folder,
            progress=lines.append,
            cache_dir=tmp_path / "cache",
            encoder=InputEmbeddings(model_dir),
        )

    made = trained("out")
    loaded = Artifact.load(tmp_path / "out" / "stealing.safetensors")
    assert loaded.card == made.card
    loaded.require_model(read_model_ref(model_dir, model_id="tiny", dtype="float32"))
    assert loaded.card.formats == (Format.CHAT, Format.RAW)
    report = loaded.card.evaluation["chat"]["pairs"]
    assert report["probe"]["auroc"][0] > 0.9
    assert {"tf_idf", "length_only", "question_mark_only", "shuffled_labels", "random_direction"} <= set(report)
    # The second text-only peer stands wherever the first does; it finds a word too.
    tables = [*loaded.card.evaluation["leave_one_source_out"]["raw"].values(), report]
    assert all(table["bag_of_embeddings"]["auroc"][0] > 0.9 for table in tables)
    # So do the probes that cannot know anything: random directions lie around chance, on both sides of it.
    for table in tables:
        middle, low, high = table["random_direction"]["auroc"]
        assert low < 0.4 < middle < 0.6 < high
        assert table["shuffled_labels"]["auroc"][0] < 0.8 < table["probe"]["auroc"][0]
    assert loaded.card.evaluation["chat"]["at_threshold"]["pairs"]["fired_positive"][1] == 40
    # A word is in the text: TF-IDF finds it too, on a careless split the fit is as good as elsewhere.
    assert loaded.card.evaluation["chat"]["in_distribution"]["auroc"][0] > 0.9
    assert loaded.card.evaluation["chat"]["verdict"] == "assist"
    assert "tf_idf" in loaded.card.evaluation["chat"]["verdict_reasons"][0]
    assert [layer for layer, *_ in loaded.card.training["layers"]] == [0, 2]
    assert any("calibration" in line for line in lines)
    assert trained("again").card == made.card

    # What is served: every token scored by the detector, then the aggregate on the card.
    detector = load_detector(loaded)
    tap = detector.directions()[0].tap
    calibration = loaded.card.calibrations[0]
    example = Example(text="please steal the bread now", label=1, source="s", group="g")
    reader = reader_of(model_dir, tmp_path / "cache", [tap.layer])
    means = reader.read(
        [example],
        text_format=Format.CHAT,
        aggregates=[calibration.aggregate],
        skip_first=loaded.card.skip_first,
        label="x",
    ).at(tap.layer, calibration.aggregate)
    fitted = means.astype(np.float64) @ detector.directions()[0].weight + detector.directions()[0].bias
    stream = activations_by_hooks(model_dir, reader.tokens(example, Format.CHAT))[tap.layer][loaded.card.skip_first :]
    scores = stream.astype(np.float64) @ detector.directions()[0].weight + detector.directions()[0].bias
    state = calibration.aggregate.new_state(1, 1)
    served = calibration.aggregate.update(state, scores[:, None, :])[-1, 0, 0]
    assert served == pytest.approx(fitted[0, 0], abs=1e-5)
    require_canary(loaded, model_dir)


def require_canary(artifact: Artifact, model_dir: Path) -> None:
    """The canary of a card holds transformers' scores, and would show another bias or scale."""
    canary, detector = artifact.card.canary, load_detector(artifact)
    assert canary is not None
    (directions,) = detector.directions()
    stream = activations_by_hooks(model_dir, list(canary.tokens))[directions.tap.layer]
    expected = stream.astype(np.float64) @ directions.weight + directions.bias
    known = Expected("d", 0, artifact.card.skip_first, np.array(canary.scores)[:, None], canary.tolerance)
    prompt, seen = CanaryPrompt(canary.tokens, (known,)), np.ones(len(canary.tokens), dtype=bool)
    assert prompt.compare(expected, seen) is None
    spread = float(expected[artifact.card.skip_first :].std())
    for change in (0.05 * spread, 0.05 * expected):
        failed = prompt.compare(expected + change, seen)
        assert failed is not None
        assert failed.reason is CanaryFailure.WRONG_SCORES


def test_a_canary_is_added_without_training_anew(model_dir: Path, recipe: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    made = train(recipe, model_dir=model_dir, model_id="t", out=tmp_path, progress=lambda _: None, cache_dir=cache)
    assert "bag_of_embeddings" not in made.card.evaluation["chat"]["pairs"]
    path, before = made.path, made.path.read_bytes()
    write_card(path, made.card.model_copy(update={"canary": None}))
    without = Artifact.load(path)
    assert without.card.canary is None
    found = canary_of(without, model_dir=model_dir, progress=lambda _: None)
    write_card(path, without.card.model_copy(update={"canary": found}))
    assert Artifact.load(path).card == made.card
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text_format", "site"),
    [(Format.CHAT, Site.RESID_POST), (Format.RAW, Site.RESID_POST), (Format.RAW, Site.ATTN_OUT),
     (Format.CHAT, Site.MLP_OUT)],
)  # fmt: skip
def test_what_is_fitted_on_is_what_is_served(model_dir: Path, tmp_path: Path, text_format: Format, site: Site) -> None:
    """A linear score of the weighted mean = the aggregate of token scores, from one plain forward pass per request."""
    rows = [
        Example(text=str(row["text"])[: 12 + i], label=0, source="s", group=str(i))
        for i, row in enumerate(sentences(9, 2))
    ]
    aggregates = [parse_aggregator(config) for config in LINEAR_AGGREGATES]
    reader = reader_of(model_dir, tmp_path / "cache", [0, 2], site)
    found = reader.read(rows, text_format=text_format, aggregates=aggregates, skip_first=1, label="x")
    weight = np.random.default_rng(4).standard_normal(32)
    for place, example in enumerate(rows):
        stream = activations_by_hooks(model_dir, reader.tokens(example, text_format), site)
        for layer in (0, 2):
            scores = stream[layer][1:].astype(np.float64) @ weight
            for aggregate in aggregates:
                served = aggregate.update(aggregate.new_state(1, 1), scores[:, None, None])[-1, 0, 0]
                if found.is_defined(aggregate)[place]:
                    assert found.at(layer, aggregate)[place] @ weight == pytest.approx(served, abs=5e-5)
                else:
                    assert served == -np.inf
    stored = reader.read(rows, text_format=text_format, aggregates=aggregates, skip_first=1, label="x")
    np.testing.assert_array_equal(stored.means, found.means)


def test_weights_of_a_rolling_mean_and_of_what_is_not_linear() -> None:
    rolling, last, largest = (
        parse_aggregator(c) for c in ({"kind": "rolling", "window": 3}, {"kind": "last"}, {"kind": "max"})
    )
    found = score_weights((rolling, last), 5)
    assert found.values == pytest.approx(np.array([[0, 0, 1 / 3, 1 / 3, 1 / 3], [0, 0, 0, 0, 1.0]]))
    assert list(score_weights((rolling, last), 2).defined) == [False, True]
    with pytest.raises(WeightsError, match="not linear"):
        score_weights((largest,), 4)


def test_sink_positions_are_found_by_their_norm(model_dir: Path, tmp_path: Path) -> None:
    reader = reader_of(model_dir, tmp_path / "cache", [0])
    rows = [Example(text=str(row["text"]), label=0, source="s", group="g") for row in sentences(4, 3)]
    assert reader.sink_positions(rows, Format.CHAT) == 0
    with torch.no_grad():
        embedding = reader._network.module.get_parameter("embed_tokens.weight")
        embedding[1] *= 1000.0  # <s>, the first token of the template (and a later one, which is no sink)
    assert reader.sink_positions(rows, Format.CHAT) == 1


def test_layers_beyond_the_model_are_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ActivationError, match="0 to 2"):
        reader_of(model_dir, tmp_path, [3])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  layers: [0, 2]", "  layer: [0, 2]", r"recipe.yaml:1\d: search.*Did you mean 'layers'"),
        ("seed: 1", "seed: 1\nseed: 2", r"recipe.yaml:6: found duplicate key"),
        ("window: 4", "window: 0", r"recipe.yaml:1\d: search.aggregates.1.*greater than or equal to 1"),
        ("kind: jsonl, path: rows.jsonl", "kind: json, path: rows.jsonl", "Did you mean 'jsonl'"),
        ("kind: jsonl, path: rows.jsonl", "kind: jsonl, paht: rows.jsonl", r"recipe.yaml:7: .*Did you mean 'path'"),
        ("held_out: 0.3", "held_out: 0", "a threshold rests on benign rows"),
        ('version: "1"', 'version: "2"', "version"),
        ("seed: 1", "seed: [", "recipe.yaml"),
    ],
)
def test_recipes_that_are_wrong(recipe: Path, old: str, new: str, message: str) -> None:
    recipe.write_text(recipe.read_text().replace(old, new, 1))
    with pytest.raises(RecipeError, match=message):
        read_recipe(recipe)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Name an existing recipe"):
        read_recipe(tmp_path / "none.yaml")
