"""Latents that were planted are found; what chance would find is told beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from probes.aggregate import parse_aggregator
from probes.artifact import Artifact, save_artifact
from probes.card import Format, Stage
from probes.detectors import load_detector
from probes.fit.evaluation.measure import auroc
from probes.fit.reading.scores import score_requests, statistic_of
from probes.fit.rows.example import Example
from probes.sae.describe.codes import read_codes
from probes.sae.describe.reading import open_sae_reader, read_requests
from probes.sae.file import SaeFile
from probes.sae.find.detector import found_detector
from probes.sae.find.find import Finding, find
from probes.sae.find.halves import FindError, split_halves
from probes.sae.find.probes import fit_latents, largest_differences
from probes.sae.find.separation import separate
from probes.sae.find.table import Table
from serving.cli import app
from tests.support.planted_sae import PLANTED, planted_sae, sentences


def rows(count: int, word: str) -> list[Example]:
    return [
        Example(text=text, label=int(word in text.split()), source="s", group=str(number // 2))
        for number, text in enumerate(sentences(count, 5))
    ]


@pytest.fixture(scope="module")
def sae(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SaeFile:
    return planted_sae(model_dir, tmp_path_factory.mktemp("sae") / "planted.safetensors", extra_words=("plan", "now"))


@pytest.fixture(scope="module")
def how(model_dir: Path) -> Finding:
    return Finding(
        model_dir=model_dir,
        model_id="words",
        progress=lambda _: None,
        text_format=Format.RAW,
        sizes=(1, 2, 64),
        permutations=99,
    )


@pytest.fixture(scope="module")
def found(sae: SaeFile, how: Finding) -> Table:
    return find(sae, rows(160, "money"), how)


def test_the_planted_latent_is_the_best_and_separates_requests_it_was_not_selected_on(found: Table) -> None:
    money = PLANTED.index("money")
    assert {latent.statistic for latent in found.latents if latent.latent == money} == {"max", "mean"}
    best = found.latents[0]
    assert (best.latent, best.statistic) == (money, "max")
    assert best.measured.value > 0.99
    assert best.p == pytest.approx(0.01)


def test_latents_of_other_words_are_not_significant_among_so_many(found: Table) -> None:
    others = [latent for latent in found.latents if latent.latent != PLANTED.index("money")]
    assert others
    assert all(latent.p > 0.05 for latent in others)


def test_every_scorer_stands_in_the_same_table(found: Table) -> None:
    names = [figure.name for figure in found.figures]
    assert names == [
        "raw activations, logistic regression",
        "1 latents, logistic regression",
        "1 random directions, likewise",
        "2 latents, logistic regression",
        "2 random directions, likewise",
        "best single latent, by its max",
        "best single latent, by its mean",
        "best single random direction, by its max",
        "best single latent, labels shuffled first",
    ]
    by_name = dict(zip(names, found.figures, strict=True))
    shuffled = by_name["best single latent, labels shuffled first"].measured
    assert shuffled.low < 0.5 < shuffled.high
    assert by_name["1 latents, logistic regression"].measured.value > 0.99
    text = "\n".join(found.lines())
    assert all(name in text for name in names)


def test_a_sparse_probe_is_told_as_weights_of_codes(found: Table) -> None:
    one = found.sparse_probes[0]
    assert one.latents == (PLANTED.index("money"),)
    assert one.weights[0] > 0


def test_no_group_stands_in_both_halves() -> None:
    examples = rows(120, "money")
    halves = split_halves(examples, seed=0)
    assert halves.by_group
    measured = {row.group for row, held in zip(examples, halves.measured, strict=True) if held}
    selected = {row.group for row, held in zip(examples, halves.measured, strict=True) if not held}
    assert not measured & selected


def test_a_label_in_one_group_is_split_by_requests_and_told() -> None:
    examples = [replace(row, group="one" if row.label else row.group + "-") for row in rows(120, "money")]
    halves = split_halves(examples, seed=0)
    assert not halves.by_group
    labels = np.array([row.label for row in examples])
    assert 0.4 < halves.measured[labels == 1].mean() < 0.6


def test_too_few_rows_are_refused(sae: SaeFile, how: Finding) -> None:
    with pytest.raises(FindError, match="8 are the least"):
        find(sae, rows(20, "money"), how)


def test_areas_are_those_of_each_latent_alone_ties_and_all() -> None:
    generator = np.random.default_rng(0)
    features = np.round(generator.normal(size=(40, 30)), 0).astype(np.float32)
    labels = (generator.random(40) < 0.4).astype(np.int64)
    result = separate(features, labels, permutations=20, seed=1)
    expected = [auroc(features[:, latent].astype(np.float64), labels) for latent in range(30)]
    np.testing.assert_allclose(result.auroc, expected, atol=1e-12)


def test_the_family_wise_error_is_held_under_the_null() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        features = generator.normal(size=(30, 50)).astype(np.float32)
        labels = generator.permutation(np.repeat([0, 1], 15))
        hits += bool((separate(features, labels, permutations=99, seed=trial).p <= 0.1).any())
    # 20 are expected; 33 or more have a chance of 0.3 %.
    assert hits < 33


def test_k_latents_are_those_with_the_largest_difference() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    codes = generator.random((200, 40)).astype(np.float32)
    codes[labels == 1, 7] += 2
    codes[labels == 1, 3] += 1
    codes[:, 9] = 0
    assert largest_differences(codes, labels)[:2].tolist() == [7, 3]
    probe = fit_latents(codes, labels, [str(i) for i in range(200)], 2)
    assert set(probe.latents) == {7, 3}
    weights = probe.probe.weight
    np.testing.assert_allclose(
        probe.score(codes), codes[:, probe.latents] @ weights + probe.probe.constant, rtol=1e-6, atol=1e-6
    )
    assert auroc(probe.score(codes), labels) > 0.95


@pytest.mark.parametrize("size", [1, 2])
def test_the_detector_scores_requests_as_the_table_did(
    sae: SaeFile, found: Table, model_dir: Path, tmp_path: Path, size: int
) -> None:
    made = found_detector(sae, found, name="rich", size=size, path=tmp_path / "rich.safetensors")
    saved = save_artifact(made.artifact.path, made.artifact.card, made.artifact.tensors)
    reader = open_sae_reader(sae, model_dir, model_id="words", progress=lambda _: None)
    requests = read_requests(reader, rows(12, "money"), Format.RAW)
    scores = score_requests([load_detector(saved)], requests, reader, skip_first=[1], label="x")[0]
    aggregate = parse_aggregator({"kind": made.aggregate})
    codes = read_codes([sae.sae()], reader, requests, skip_first=1, label="x")[0]
    money = PLANTED.index("money")
    for number, request in enumerate(scores):
        if size == 1:
            expected = float(codes.maxima()[number, money])
        else:
            probe = found.sparse_probes[1]
            expected = float(codes.means()[number, list(probe.latents)] @ np.array(probe.weights)) + probe.bias
        assert statistic_of(aggregate, Stage.PROMPT, request.scores) == pytest.approx(expected, abs=1e-4)
    assert saved.card.evaluation["find"]["measured"]["value"] > 0.95
    with pytest.raises(FindError, match="no probe of 7"):
        found_detector(sae, found, name="rich", size=7, path=tmp_path / "rich.safetensors")


def test_the_command_prints_the_table_and_writes_table_and_detector(
    sae: SaeFile, model_dir: Path, tmp_path: Path
) -> None:
    data = tmp_path / "set.jsonl"
    data.write_text("".join(json.dumps({"text": row.text, "label": row.label}) + "\n" for row in rows(120, "money")))
    command = ["sae", "find", str(sae.path), "--data", str(data), "--model", str(model_dir), "--format", "raw"]
    command += ["--sizes", "1,2", "--permutations", "99", "--out", str(tmp_path / "table.json")]
    command += ["--detector", "rich", "--detectors", str(tmp_path)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    table = Table.model_validate_json((tmp_path / "table.json").read_bytes())
    assert result.stdout.splitlines() == list(table.lines())
    assert Artifact.load(tmp_path / "rich.safetensors").card.kind == "sae_latent"
