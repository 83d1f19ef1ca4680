"""Fitters: each finds what is there, treats both classes alike, and is what an independent implementation gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

import probes.fit.fitters
from probes.fit.evaluation.measure import auroc
from probes.fit.fitters import Fitter, FitterError, fitter_kinds, parse_fitter
from probes.fit.fitters.lda import Lda
from probes.fit.fitters.logistic import Logistic
from probes.fit.fitters.mean_difference import MeanDifference
from tests.support.planted_rows import planted

ALL: list[Fitter] = [
    Lda(),
    Lda(shrinkage=0.5),
    Logistic(inverse_penalty=1.0),
    Logistic(inverse_penalty=1e-3),
    MeanDifference(),
]
each = pytest.mark.parametrize("fitter", ALL, ids=str)
LOUDEST = '''
import numpy as np
from probes.fit.fitters.base import Fitter
from probes.fit.training.linear_probe import LinearProbe


class Loudest(Fitter):
    """The one dimension that tells most."""

    kind = "loudest"

    def fit(self, features, labels):
        gap = features[labels == 1].mean(axis=0) - features[labels == 0].mean(axis=0)
        direction = np.zeros(features.shape[1], dtype=np.float32)
        best = np.argmax(np.abs(gap) / features.std(axis=0))
        direction[best] = np.sign(gap[best])
        return LinearProbe(direction, features.mean(axis=0), np.ones_like(direction), 0.0)
'''


def test_every_kind_is_tested_here() -> None:
    assert {type(fitter) for fitter in ALL} == set(fitter_kinds().values())


@each
def test_it_tells_classes_apart_on_rows_that_it_has_not_seen(fitter: Fitter) -> None:
    features, labels = planted()
    probe = fitter.fit(features[:2000], labels[:2000])
    held_out, truth = features[2000:], labels[2000:]
    # The mean difference knows nothing of the dimensions' different sizes.
    assert auroc(probe.score(held_out), truth) > (0.65 if isinstance(fitter, MeanDifference) else 0.9)
    # Above 0 is what it takes for the second class.
    assert np.mean((probe.score(held_out) > 0) == truth) > (0.6 if isinstance(fitter, MeanDifference) else 0.8)


@each
def test_exchanging_the_classes_exchanges_the_sign(fitter: Fitter) -> None:
    features, labels = planted(400)
    one, other = fitter.fit(features, labels), fitter.fit(features, 1 - labels)
    np.testing.assert_allclose(one.score(features), -other.score(features), atol=1e-3)


@each
def test_rows_that_stand_twice_in_one_class_change_little(fitter: Fitter) -> None:
    """Both classes weigh alike: three times as many benign rows do not move the threshold to their side."""
    features, labels = planted(600)
    benign = features[labels == 0]
    more = np.concatenate([features, benign, benign]), np.concatenate([labels, np.zeros(2 * len(benign), np.int64)])
    one, other = fitter.fit(features, labels).score(features), fitter.fit(*more).score(features)
    assert abs(np.mean(one > 0) - np.mean(other > 0)) <= 0.05


@each
def test_a_constant_dimension_is_no_reason_to_fail(fitter: Fitter) -> None:
    features, labels = planted(200)
    features[:, 0] = 5.0
    probe = fitter.fit(features, labels)
    assert np.isfinite(probe.score(features)).all()
    assert np.all(probe.scale > 0)


def test_logistic_equals_sklearn() -> None:
    features, labels = planted(500)
    rows = (features.astype(np.float64) - features.mean(axis=0)) / features.std(axis=0)
    model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000).fit(rows, labels)
    found = Logistic(inverse_penalty=0.1).fit(features, labels).score(features)
    np.testing.assert_allclose(found, model.decision_function(rows), atol=1e-3)


def test_lda_equals_sklearns_other_solver() -> None:
    features, labels = planted(500)
    rows = (features.astype(np.float64) - features.mean(axis=0)) / features.std(axis=0)
    model = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.3, priors=[0.5, 0.5]).fit(rows, labels)
    found = Lda(shrinkage=0.3).fit(features, labels).score(features)
    np.testing.assert_allclose(found, model.decision_function(rows), atol=1e-3)


def test_the_mean_difference_points_from_one_mean_to_the_other() -> None:
    features, labels = planted(300)
    probe = MeanDifference().fit(features, labels)
    gap = features[labels == 1].mean(axis=0) - features[labels == 0].mean(axis=0)
    cosine = float(probe.direction @ gap / np.linalg.norm(probe.direction) / np.linalg.norm(gap))
    assert cosine == pytest.approx(1.0, abs=1e-5)
    scores = probe.score(features)
    assert np.mean([scores[labels == label].std() for label in (0, 1)]) == pytest.approx(1.0, abs=0.05)
    assert scores[labels == 0].mean() == pytest.approx(-scores[labels == 1].mean(), abs=1e-3)


def test_a_fitter_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loudest.py").write_text(LOUDEST)
    monkeypatch.setattr(probes.fit.fitters, "__path__", [*probes.fit.fitters.__path__, str(tmp_path)])
    fitter = parse_fitter({"kind": "loudest"})
    features, labels = planted(300)
    assert auroc(fitter.fit(features, labels).score(features), labels) > 0.6


@each
def test_survives_a_recipe(fitter: Fitter) -> None:
    assert parse_fitter(fitter.config()) == fitter
    assert str(fitter).startswith(fitter.kind)


def test_what_is_no_fitter_is_refused() -> None:
    with pytest.raises(FitterError, match=r"fitter kind 'logstic' is not known. Did you mean 'logistic'"):
        parse_fitter({"kind": "logstic"})
    with pytest.raises(FitterError, match=r"a fitter is written \{kind: NAME, ...\}. Kinds: lda, logistic"):
        parse_fitter("logistic")
    for wrong in (
        {"kind": "logistic"},
        {"kind": "logistic", "inverse_penalty": 0.0},
        {"kind": "lda", "shrinkage": 2.0},
    ):
        with pytest.raises(ValidationError):
            parse_fitter(wrong)
