"""`telltale eval` on the kinds that are not linear: their own fits, repeated on other rows, labels and models."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from probes.aggregate.max import Max
from probes.aggregate.mean import Mean
from probes.artifact import Artifact
from probes.card import Format, Stage
from probes.detectors import load_detector
from probes.fit.estimator import ProbeEstimator
from probes.fit.evaluation.controls import Control
from probes.fit.evaluation.evaluation import Report
from probes.fit.evaluation.lint import read_report
from probes.fit.evaluation.token_refit import TokenRefit
from probes.fit.fitters.logistic import Logistic
from probes.fit.reading.scores import open_reader, score_requests, statistics_of_requests
from probes.fit.refits import kind_fit
from probes.fit.rows.example import Example
from probes.fit.rows.split import Fold
from probes.fit.sources.jsonl import read_jsonl
from probes.fit.token_fitters import TokenFitter
from probes.fit.token_fitters.attention import AttentionFitter
from probes.fit.token_fitters.mlp import MlpFitter
from probes.fit.token_fitters.multimax import MultiMaxFitter
from probes.fit.training.drift import make_drift
from probes.fit.training.making import Making
from probes.fit.training.unlabelled import make_lens, make_novelty
from probes.speaker import Speaker
from serving.cli import app
from tests.support.word_detector import WORD, write_rows
from tests.unit.test_drift_command import conversation

FITTERS: dict[str, TokenFitter] = {
    "attention": AttentionFitter(heads=2, epochs=12),
    "multimax": MultiMaxFitter(heads=2, epochs=12),
    "mlp": MlpFitter(units=8, pool="max", epochs=12),
}
MEASURED = ("elsewhere", "tickets")
TRAINED = ("forum", "manual")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TELLTALE_CACHE", str(tmp_path_factory.getbasetemp() / "kinds-cache"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "train.jsonl", list(TRAINED), 60, 0, replies=False)
    write_rows(folder / "test.jsonl", list(MEASURED), 45, 1, replies=False)
    return folder


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    rng = np.random.default_rng(0)
    for name, sources, count in (("train", TRAINED, 160), ("test", MEASURED, 100)):
        lines = [{**conversation(rng, i % 2), "source": sources[i // 2 % 2]} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


def making(model_dir: Path, folder: Path, layer: int = 1) -> Making:
    return Making(
        model_dir=model_dir, model_id="words", layer=layer, name="made", description="by a test", out=folder,
        created_by="a test", progress=lambda _text: None, cache_dir=folder,
    )  # fmt: skip


def fitted(fitter: TokenFitter, model_dir: Path, train: Sequence[Example], folder: Path) -> Artifact:
    probe = ProbeEstimator(model_dir, layers=[1], fitter=fitter, cache_dir=folder)
    probe.fit(train, [row.label for row in train])
    probe.calibrate([row for row in train if not row.label][:70], target_fpr=0.05)
    return probe.artifact("made", "by a test").save(folder / "made.safetensors")


def calibrated(artifact: Artifact, benign: Path, model_dir: Path, aggregate: str) -> None:
    words = ["calibrate", str(artifact.path), "--benign", str(benign), "--aggregate", aggregate, "--format", "chat"]
    words += ["--target-fpr", "0.1", "--model", str(model_dir)]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0


def benign_of(path: Path, folder: Path) -> Path:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not json.loads(line)["label"]]
    (folder / "benign.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "benign.jsonl"


def evaluated(folder: Path, model_dir: Path, rows: Path, seed: int = 0) -> Report:
    words = ["eval", str(folder / "made.safetensors"), "--data", str(rows / "test.jsonl"), "--encoder", "input"]
    words += [
        "--train",
        str(rows / "train.jsonl"),
        "--model",
        str(model_dir),
        "--out",
        str(folder),
        "--seed",
        str(seed),
    ]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return read_report(folder / "made.prompt.json")


@pytest.mark.parametrize("kind", FITTERS)
def test_what_a_token_fitter_made_is_fitted_again(kind: str, model_dir: Path, rows: Path, tmp_path: Path) -> None:
    fitted(FITTERS[kind], model_dir, read_jsonl(rows / "train.jsonl"), tmp_path)
    report = evaluated(tmp_path, model_dir, rows)
    found = report.formats[Format.CHAT]
    assert report.detector.kind == kind
    assert report.refit == f"{FITTERS[kind]}, as on the card"
    assert found.table.absent == ()
    assert found.table.detector.auroc.value > 0.9
    assert found.leave_one_out is not None
    assert {fold.source for fold in found.leave_one_out.folds} == set(TRAINED)
    assert found.leave_one_out.detector.value > 0.75
    assert found.in_distribution is not None
    assert found.in_distribution.value > 0.85
    shuffled = next(band for band in found.table.bands if band.name is Control.SHUFFLED_LABELS)
    assert shuffled.draws == 5
    assert shuffled.median < 0.75
    assert found.table.control(Control.RANDOM_INIT) is not None


@pytest.mark.parametrize("kind", FITTERS)
def test_a_fold_is_the_fitters_own_fit_and_statistic(kind: str, model_dir: Path, rows: Path, tmp_path: Path) -> None:
    examples = read_jsonl(rows / "train.jsonl")[:80]
    artifact = fitted(FITTERS[kind], model_dir, examples, tmp_path)
    (calibration,) = artifact.card.calibrations
    refit = TokenRefit.of(artifact, calibration, kind_fit(artifact))
    reader = open_reader([artifact], model_dir, model=artifact.card.model, cache_dir=tmp_path, progress=lambda _: None)
    everything = tuple(range(len(examples)))
    whole = Fold("whole", everything, everything)
    (found,) = refit.fold_scores(reader, examples, [whole], Format.CHAT, label="x")
    # Fitted on the rows of the detector itself, the fit is the detector.
    rendered = reader.render(examples, text_format=Format.CHAT, stage=Stage.PROMPT)
    (scores,) = score_requests(
        [load_detector(artifact)], rendered, reader, skip_first=[artifact.card.skip_first], label="x"
    )
    expected = statistics_of_requests(calibration.aggregate, Stage.PROMPT, scores)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.std())
    (other,) = refit.fold_scores(reader, examples, [Fold("half", everything[::2], everything)], Format.CHAT, label="x")
    assert np.abs(other - expected).max() > 0.01 * expected.std()


def test_novelty_is_fitted_again_on_the_ordinary_rows(model_dir: Path, rows: Path, tmp_path: Path) -> None:
    train = read_jsonl(rows / "train.jsonl")
    ordinary = [row for row in train if not row.label]
    artifact = make_novelty(making(model_dir, tmp_path), ordinary, text_formats=[Format.CHAT], components=6)
    calibrated(artifact, benign_of(rows / "test.jsonl", tmp_path), model_dir, "mean")
    report = evaluated(tmp_path, model_dir, rows)
    found = report.formats[Format.CHAT]
    assert report.refit == "6 principal components of the rows labelled 0"
    assert found.table.absent == ()
    assert found.leave_one_out is not None
    assert found.in_distribution is not None

    artifact = Artifact.load(artifact.path)
    how = kind_fit(artifact)
    refit = TokenRefit.of(artifact, artifact.card.calibrations[0], how)
    reader = open_reader([artifact], model_dir, model=artifact.card.model, cache_dir=tmp_path, progress=lambda _: None)
    everything = tuple(range(len(train)))
    (again,) = refit.fold_scores(reader, train, [Fold("whole", everything, everything)], Format.CHAT, label="x")
    rendered = reader.render(train, text_format=Format.CHAT, stage=Stage.PROMPT)
    (scores,) = score_requests(
        [load_detector(artifact)], rendered, reader, skip_first=[artifact.card.skip_first], label="x"
    )
    np.testing.assert_allclose(again, statistics_of_requests(Mean(), Stage.PROMPT, scores), rtol=1e-3)


def test_a_lens_is_made_of_the_random_models_own_unembedding(model_dir: Path, rows: Path, tmp_path: Path) -> None:
    artifact = make_lens(making(model_dir, tmp_path, layer=2), tokens=[WORD], contrast=["bake", "plan"])
    calibrated(artifact, benign_of(rows / "test.jsonl", tmp_path), model_dir, "max")
    report = evaluated(tmp_path, model_dir, rows, seed=1)  # the model itself is drawn with the seed 0
    found = report.formats[Format.CHAT]
    (absent,) = found.table.absent
    assert (absent.name, absent.applies) == (Control.SHUFFLED_LABELS, False)
    assert "no label takes part" in absent.reason
    random = found.table.control(Control.RANDOM_INIT)
    assert random is not None
    assert random.auroc.value != found.table.detector.auroc.value
    assert found.leave_one_out is not None
    # Nothing is fitted: each source is scored by the detector itself.
    train = read_jsonl(rows / "train.jsonl")
    artifact = Artifact.load(artifact.path)
    refit = TokenRefit.of(artifact, artifact.card.calibrations[0], kind_fit(artifact))
    reader = open_reader([artifact], model_dir, model=artifact.card.model, cache_dir=tmp_path, progress=lambda _: None)
    (again,) = refit.fold_scores(reader, train, [Fold("some", (0, 1), tuple(range(50)))], Format.CHAT, label="x")
    rendered = reader.render(train[:50], text_format=Format.CHAT, stage=Stage.PROMPT)
    (scores,) = score_requests(
        [load_detector(artifact)], rendered, reader, skip_first=[artifact.card.skip_first], label="x"
    )
    np.testing.assert_allclose(again, statistics_of_requests(Max(), Stage.PROMPT, scores), rtol=1e-6)


def test_drift_is_fitted_again_on_what_changes(model_dir: Path, conversations: Path, tmp_path: Path) -> None:
    train = read_jsonl(conversations / "train.jsonl")
    fitter = Logistic(inverse_penalty=0.01)
    artifact = make_drift(making(model_dir, tmp_path), train, segments=(Speaker.TOOL,), fitter=fitter)
    calibrated(artifact, benign_of(conversations / "test.jsonl", tmp_path), model_dir, "delta")
    report = evaluated(tmp_path, model_dir, conversations)
    found = report.formats[Format.CHAT]
    assert report.refit == f"{fitter} on what changes, as on the card"
    assert found.table.absent == ()
    assert found.table.detector.auroc.value > 0.9
    assert found.leave_one_out is not None
    assert found.leave_one_out.detector.value > 0.9
    shuffled = next(band for band in found.table.bands if band.name is Control.SHUFFLED_LABELS)
    assert shuffled.median < 0.8


@pytest.mark.parametrize(
    ("kind", "strip", "aggregate", "message"),
    [
        ("multimax", "fitter", "", r"names no fitter that makes it \(known: multimax\)"),
        ("lens", "ids", "max", "does not name the ids of its tokens"),
        ("drift", "fitter", "delta", "the card names no fitter"),
    ],
)
def test_a_card_that_does_not_say_how_is_not_fitted_again(  # noqa: PLR0917 - fixtures
    kind: str,
    strip: str,
    aggregate: str,
    message: str,
    model_dir: Path,
    rows: Path,
    conversations: Path,
    tmp_path: Path,
) -> None:
    data = conversations if kind == "drift" else rows
    train, place = read_jsonl(data / "train.jsonl"), making(model_dir, tmp_path)
    if kind == "multimax":
        artifact = fitted(FITTERS["multimax"], model_dir, train, tmp_path)
    elif kind == "lens":
        artifact = make_lens(place, tokens=[WORD], contrast=["bake"])
    else:
        artifact = make_drift(place, train, segments=(Speaker.TOOL,), fitter=Logistic(inverse_penalty=0.1))
    training = {key: value for key, value in artifact.card.training.items() if key != strip}
    card = artifact.card.model_copy(update={"training": training})
    Artifact(artifact.path, card, artifact.tensors).save(artifact.path)
    if aggregate:
        calibrated(artifact, benign_of(data / "test.jsonl", tmp_path), model_dir, aggregate)
    report = evaluated(tmp_path, model_dir, data)
    assert report.refit.startswith(f"not repeated: a detector of kind {kind!r} is not fitted again: ")
    assert re.search(message, report.refit)
    absent = {absent.name for absent in report.formats[Format.CHAT].table.absent}
    assert absent == {Control.SHUFFLED_LABELS, Control.RANDOM_INIT}
