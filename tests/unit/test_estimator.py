"""Probes for notebooks: what is fitted on texts is what an artifact serves, for every kind that can be fitted so."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from probes.aggregate import Aggregator
from probes.aggregate.ema import Ema
from probes.aggregate.max import Max
from probes.artifact import Artifact
from probes.card import Format, Stage
from probes.detectors import load_detector
from probes.fit.estimator import EstimatorError, ProbeEstimator
from probes.fit.evaluation.evaluation_rows import EvaluationError
from probes.fit.evaluation.measure import auroc
from probes.fit.fitters import Fitter
from probes.fit.fitters.lda import Lda
from probes.fit.fitters.logistic import Logistic
from probes.fit.rows.example import Example
from probes.fit.token_fitters import TokenFitter
from probes.fit.token_fitters.attention import AttentionFitter
from probes.fit.token_fitters.mlp import MlpFitter
from probes.fit.token_fitters.multimax import MultiMaxFitter

FORMS = ["how can i {} the {} {}", "please write a plan to {} {} {}", "{} the {} {}", "i {} a {} {} now"]
LATER = ["today", "quickly", "alone", "for the party"]
REQUESTS = [
    (form.format(verb, thing, when), int(verb == "steal"))
    for form, verb, thing, when in itertools.product(FORMS, ("steal", "bake"), ("bread", "money"), LATER)
]
TEXTS, LABELS = [text for text, _ in REQUESTS], [label for _, label in REQUESTS]
Case = tuple[str, tuple[int, ...], Fitter | TokenFitter | None, Aggregator | None]
"""Kind of the detector, layers, fitter and aggregate."""
CASES: list[Case] = [
    ("linear", (1,), None, None),
    ("linear", (1,), Lda(), Ema(alpha=0.3)),
    ("linear", (0,), Logistic(inverse_penalty=1.0), Max()),
    ("ensemble", (0, 1, 2), Logistic(inverse_penalty=0.1), Ema(alpha=0.3)),
    ("attention", (1,), AttentionFitter(heads=2, epochs=15), None),
    ("multimax", (1,), MultiMaxFitter(heads=2, epochs=15), None),
    ("mlp", (1,), MlpFitter(units=8, epochs=15), None),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{kind}-{f.kind if f else ''}-{a}" for kind, _, f, a in CASES])
def test_it_finds_a_word_and_the_saved_artifact_says_the_same(case: Case, model_dir: Path, tmp_path: Path) -> None:
    kind, layers, fitter, aggregate = case
    settings = {"layers": layers, "fitter": fitter, "aggregate": aggregate, "cache_dir": tmp_path}
    probe = ProbeEstimator(model_dir, **settings).fit(TEXTS[::2], LABELS[::2])  # type: ignore[arg-type]
    found = probe.decision_function(TEXTS[1::2])
    assert auroc(found, np.array(LABELS[1::2])) > 0.95
    calibration = probe.calibrate([text for text, label in REQUESTS[1::2] if not label], target_fpr=0.2)
    assert probe.predict(TEXTS[1::2]).tolist() == (found > calibration.threshold).astype(int).tolist()
    saved = probe.artifact("steals", "asks how to steal").save(tmp_path / "steals.safetensors")
    loaded = Artifact.load(tmp_path / "steals.safetensors")
    assert loaded.card == saved.card
    assert (loaded.card.kind, loaded.card.calibrations) == (kind, (calibration,))
    detector = load_detector(loaded)
    assert len(detector.directions()) == len(layers)


def test_it_is_an_estimator_as_scikit_learn_knows_them(model_dir: Path, tmp_path: Path) -> None:
    probe = ProbeEstimator(model_dir, layers=(1,), aggregate=Ema(alpha=0.2), cache_dir=tmp_path)
    again = clone(probe)
    assert again.get_params() == probe.get_params()
    with pytest.raises(NotFittedError):
        probe.decision_function(TEXTS)
    probe.fit(TEXTS, LABELS)
    assert probe.score(TEXTS, LABELS) > 0.9
    assert probe.classes_.tolist() == [0, 1]


def test_conversations_and_replies_are_read(model_dir: Path, tmp_path: Path) -> None:
    talks = [
        [{"role": "user", "content": "please bake"}, {"role": "assistant", "content": text.split(maxsplit=1)[1]}]
        for text in TEXTS
    ]
    probe = ProbeEstimator(model_dir, layers=(1,), stage=Stage.RESPONSE, aggregate=Max(), cache_dir=tmp_path)
    said = [int("steal" in talk[-1]["content"]) for talk in talks]
    assert 0 < sum(said) < len(said)
    probe.fit(talks, said)
    assert auroc(probe.decision_function(talks), np.array(said)) > 0.95
    # What was asked is the same for all: only the reply is read.
    asked = [[{"role": "user", "content": "how can i steal"}, talk[1]] for talk in talks]
    assert auroc(probe.decision_function(asked), np.array(said)) > 0.9


def test_raw_texts_are_read_as_they_are(model_dir: Path, tmp_path: Path) -> None:
    probe = ProbeEstimator(model_dir, layers=(0,), text_format=Format.RAW, cache_dir=tmp_path).fit(TEXTS, LABELS)
    assert probe.artifact("steals", "asks how to steal").card.formats == (Format.RAW,)
    assert auroc(probe.decision_function(TEXTS), np.array(LABELS)) > 0.95


@pytest.mark.parametrize("labels", [[0] * len(TEXTS), LABELS[:-1], [label + 1 for label in LABELS]])
def test_labels_that_say_nothing_are_refused(labels: list[int], model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EstimatorError, match="both labels, 0 and 1"):
        ProbeEstimator(model_dir, layers=(1,), cache_dir=tmp_path).fit(TEXTS, labels)


def test_the_labels_given_count_also_for_rows_that_have_their_own(model_dir: Path, tmp_path: Path) -> None:
    rows = [Example(text=text, label=1 - label, source="s", group=text) for text, label in REQUESTS]
    probe = ProbeEstimator(model_dir, layers=(1,), cache_dir=tmp_path).fit(rows, LABELS)
    assert auroc(probe.decision_function(TEXTS), np.array(LABELS)) > 0.95
    with pytest.raises(EstimatorError, match="both labels, 0 and 1"):
        probe.evaluate(TEXTS, LABELS[:-1])


def test_a_token_fitter_reads_one_layer(model_dir: Path, tmp_path: Path) -> None:
    probe = ProbeEstimator(model_dir, layers=(0, 1), fitter=AttentionFitter(), cache_dir=tmp_path)
    with pytest.raises(EstimatorError, match="reads one layer; 2 were named"):
        probe.fit(TEXTS, LABELS)


def test_an_evaluation_has_its_controls_and_is_complete(model_dir: Path, tmp_path: Path) -> None:
    probe = ProbeEstimator(model_dir, layers=(1,), cache_dir=tmp_path).fit(TEXTS[::2], LABELS[::2])
    with pytest.raises(EvaluationError, match="calibrat"):
        probe.evaluate(TEXTS[1::2], LABELS[1::2])
    probe.calibrate([text for text, label in REQUESTS[1::2] if not label], target_fpr=0.2)
    report = probe.evaluate(TEXTS, LABELS)
    # Those that it was fitted on are taken out.
    assert report.data.rows == len(TEXTS) // 2
    assert report.training_data is not None
    (found,) = report.formats.values()
    assert {"tf_idf", "length_only", "shuffled_labels", "random_direction"} <= set(found.table.card())
    assert report.verdict.grade.value in {"ship", "assist", "reject", "shortcut"}
