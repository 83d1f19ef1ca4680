"""Planted shortcuts are called shortcuts, a planted concept is not; verdicts follow their rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from probes.fit.evaluation.baselines import TfIdfPeer, labels_of
from probes.fit.evaluation.controls import Control
from probes.fit.evaluation.cross_source import (
    FoldScores,
    in_distribution,
    leave_one_out,
    peer_scores,
    random_folds,
    source_folds,
)
from probes.fit.evaluation.evaluate import ScoredRows, compare, trivial_in
from probes.fit.evaluation.evaluation import SplitPolicy
from probes.fit.evaluation.measure import Estimate
from probes.fit.evaluation.verdict import SOURCE, Evidence, Grade, Trivial, Verdict, decide, least
from probes.fit.evaluation.weigh import Home, weigh
from probes.fit.fitters.logistic import Logistic
from probes.fit.rows.example import Example
from probes.fit.rows.split import Fold

WIDTH = 12
CONCEPT, FROM, LENGTH = 0, 1, 2
"""Dimensions of the activations: what the label means, where the row comes from, how long it is."""
WORDS = ["river", "window", "basket", "lantern", "pepper", "saddle", "violin", "meadow", "copper", "harbor", "timber"]


class Planted:
    """Rows of several sources, and activations in which label, source and length each have a dimension."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self.examples: list[Example] = []
        self._features: list[np.ndarray] = []

    def add(self, source: str, label: int, count: int, *, concept: float, place: float, words: int) -> None:
        """Rows of one source and label: how far its activations lie along the concept and the source's direction."""
        for _ in range(count):
            length = max(1, words + int(self._generator.integers(-2, 3)))
            text = " ".join(self._generator.choice(WORDS, length))
            features = self._generator.standard_normal(WIDTH)
            features[CONCEPT] += concept
            features[FROM] += place
            features[LENGTH] += len(text) / 10
            number = len(self.examples)
            self.examples.append(Example(text=text, label=label, source=source, group=f"{source}/{number}"))
            self._features.append(features)

    @property
    def features(self) -> np.ndarray:
        """(rows, WIDTH) float32."""
        return np.array(self._features, dtype=np.float32)


def verdict_of(train: Planted, measured: Planted) -> Verdict:
    """Fit on some rows, measure on others, with every fold's refit: the way of ``telltale eval``."""
    fitter = Logistic(inverse_penalty=0.1)
    examples, features, labels = train.examples, train.features, labels_of(train.examples)

    def scores(folds: list[Fold]) -> list[np.ndarray]:
        return [
            fitter.fit(features[list(fold.train)], labels[list(fold.train)]).score(features[list(fold.test)])
            for fold in folds
        ]

    folds, careless = source_folds(examples, seed=0), random_folds(examples, seed=0)
    texts = peer_scores([TfIdfPeer()], examples, folds)
    home = Home(
        leave_one_out=leave_one_out(
            examples,
            [
                FoldScores(fold=fold, detector=found, peers=peers)
                for fold, found, peers in zip(folds, scores(folds), texts, strict=True)
            ],
            seed=0,
        ),
        in_distribution=in_distribution(
            examples,
            [
                FoldScores(fold=fold, detector=found, peers={})
                for fold, found in zip(careless, scores(careless), strict=True)
            ],
            seed=0,
        ),
        trivial=trivial_in(examples),
    )
    shared = {row.source for row in measured.examples} & {row.source for row in examples}
    table = compare(
        ScoredRows(
            examples=measured.examples,
            scores=fitter.fit(features, labels).score(measured.features),
            peers={Control.TF_IDF: TfIdfPeer().scores(examples, measured.examples)},
        ),
        seed=0,
    )
    return weigh(table, SplitPolicy.GROUPED if shared else SplitPolicy.HELD_OUT_SOURCES, home)


def elsewhere(*, concept: float, seed: int = 1) -> Planted:
    """A source that nobody has trained on: neither its place nor its length says anything of the label."""
    rows = Planted(seed)
    for label in (0, 1):
        rows.add("elsewhere", label, 150, concept=concept * label, place=0.0, words=9)
    return rows


def test_a_label_that_leaks_through_the_source() -> None:
    train = Planted(0)
    train.add("forum", 1, 200, concept=0.0, place=5.0, words=9)
    train.add("manual", 0, 200, concept=0.0, place=-5.0, words=9)
    found = verdict_of(train, elsewhere(concept=0.0))
    assert (found.grade, found.shortcut) == (Grade.SHORTCUT, SOURCE)
    assert "what it has learned is not the concept" in found.reasons[0]


def test_a_label_that_leaks_through_the_length() -> None:
    train = Planted(0)
    for source in ("forum", "manual"):
        train.add(source, 1, 100, concept=0.0, place=0.0, words=24)
        train.add(source, 0, 100, concept=0.0, place=0.0, words=6)
    found = verdict_of(train, elsewhere(concept=0.0))
    assert (found.grade, found.shortcut) == (Grade.SHORTCUT, Control.LENGTH_ONLY.value)


def test_a_leak_that_the_measured_rows_share() -> None:
    """Nothing but rows of one kind: length does as well, so nobody can tell what was learned."""
    train, measured = Planted(0), Planted(1)
    for rows in (train, measured):
        for source in ("forum", "manual"):
            rows.add(source, 1, 100, concept=0.0, place=0.0, words=24)
            rows.add(source, 0, 100, concept=0.0, place=0.0, words=6)
    found = verdict_of(train, measured)
    assert (found.grade, found.shortcut) == (Grade.SHORTCUT, Control.LENGTH_ONLY.value)


def test_a_leak_in_most_of_the_sources_is_seen_by_leaving_them_out() -> None:
    """Each source has a side of its own along its direction; only the training rows are there to tell."""
    train = Planted(0)
    for source, place in (("forum", 5.0), ("manual", -5.0)):
        train.add(source, 1, 100, concept=0.0, place=place, words=9)
        train.add(source, 0, 100, concept=0.0, place=-place, words=9)
    measured = Planted(1)
    measured.add("forum", 1, 100, concept=0.0, place=5.0, words=9)
    measured.add("forum", 0, 100, concept=0.0, place=-5.0, words=9)
    found = verdict_of(train, measured)
    # The two sources contradict each other, so no linear fit is good at home either: no shortcut, but nothing to ship.
    assert found.grade is Grade.REJECT


def test_a_true_concept_is_no_shortcut_whatever_the_sources_are_like() -> None:
    train = Planted(0)
    for source, place in (("forum", 3.0), ("manual", -3.0), ("tickets", 0.0)):
        for label in (0, 1):
            train.add(source, label, 100, concept=4.0 * label, place=place, words=9)
    found = verdict_of(train, elsewhere(concept=4.0))
    assert (found.grade, found.shortcut) == (Grade.SHIP, None)
    assert "no source of theirs was trained on" in found.rests_on
    # The same, measured at home: the folds decide.
    home = Planted(2)
    for label in (0, 1):
        home.add("forum", label, 100, concept=4.0 * label, place=3.0, words=9)
    found = verdict_of(train, home)
    assert (found.grade, found.shortcut) == (Grade.SHIP, None)
    assert "left out" in found.rests_on


def test_a_concept_with_a_source_of_its_own_for_each_label_is_still_found_elsewhere() -> None:
    train = Planted(0)
    train.add("forum", 1, 150, concept=8.0, place=2.0, words=9)
    train.add("manual", 0, 150, concept=0.0, place=-2.0, words=9)
    found = verdict_of(train, elsewhere(concept=8.0))
    assert (found.grade, found.shortcut) == (Grade.SHIP, None)


def test_no_group_stands_on_two_sides_of_a_fold() -> None:
    train = Planted(0)
    for source in ("forum", "manual", "tickets"):
        for label in (0, 1):
            train.add(source, label, 60, concept=float(label), place=0.0, words=9)
    shared = [replace(row, group=f"pair/{i % 50}") for i, row in enumerate(train.examples)]
    for examples in (train.examples, shared):
        for fold in source_folds(examples, seed=0):
            assert {examples[i].source for i in fold.test} == {fold.name}
            assert not {examples[i].source for i in fold.train} & {fold.name}
            assert not {examples[i].group for i in fold.train} & {examples[i].group for i in fold.test}
    assert len(source_folds(train.examples, seed=0)) == 3
    one = [row for row in train.examples if row.source == "forum"]
    assert source_folds(one, seed=0) == []
    for fold in random_folds(train.examples, seed=0):
        assert {train.examples[i].source for i in fold.test} == {"forum", "manual", "tickets"}


def estimate(value: float, half: float = 0.02) -> Estimate:
    return Estimate(value, value - half, value + half)


GOOD = Evidence(
    detector=estimate(0.9),
    rests_on="the measured rows",
    texts={Control.TF_IDF: 0.8, Control.LENGTH_ONLY: 0.6},
    trivial={Control.LENGTH_ONLY: Trivial(estimate(0.6), estimate(0.3))},
    in_distribution=0.97,
    out_of_source=0.9,
    trivial_in_training={Control.LENGTH_ONLY: 0.55},
)


@pytest.mark.parametrize(
    ("changes", "grade", "shortcut"),
    [
        ({}, Grade.SHIP, None),
        ({"texts": {Control.TF_IDF: 0.88}}, Grade.ASSIST, None),
        ({"texts": {Control.TF_IDF: 0.7, Control.SENTENCE_EMBEDDING: 0.95}}, Grade.ASSIST, None),
        ({"texts": {Control.LENGTH_ONLY: 0.6}}, Grade.ASSIST, None),
        ({"detector": estimate(0.51)}, Grade.REJECT, None),
        ({"out_of_source": 0.6}, Grade.SHORTCUT, SOURCE),
        ({"out_of_source": 0.61}, Grade.SHIP, None),
        ({"out_of_source": 0.6, "in_distribution": 0.94}, Grade.SHIP, None),
        ({"out_of_source": None}, Grade.SHIP, None),
        ({"in_distribution": None, "out_of_source": 0.5}, Grade.SHIP, None),
        (
            {"out_of_source": 0.5, "trivial_in_training": {Control.LENGTH_ONLY: 0.93, Control.QUESTION_MARK_ONLY: 0.9}},
            Grade.SHORTCUT,
            "length_only",
        ),
        ({"trivial": {Control.QUESTION_MARK_ONLY: Trivial(estimate(0.89), estimate(0.01))}}, Grade.SHORTCUT,
         "question_mark_only"),
        ({"trivial": {Control.QUESTION_MARK_ONLY: Trivial(estimate(0.51), estimate(0.01))}}, Grade.SHIP, None),
        # Near chance on other sources after a good figure at home is a shortcut, not merely a reject.
        ({"detector": estimate(0.5), "out_of_source": 0.5}, Grade.SHORTCUT, SOURCE),
    ],
)  # fmt: skip
def test_each_verdict_is_reached_by_its_figures(changes: dict[str, Any], grade: Grade, shortcut: str | None) -> None:
    found = decide(replace(GOOD, **changes))
    assert (found.grade, found.shortcut) == (grade, shortcut)
    assert found.reasons
    assert found.rests_on == "the measured rows"


def test_without_a_trained_text_peer_nothing_ships() -> None:
    found = decide(replace(GOOD, texts={Control.LENGTH_ONLY: 0.55}))
    assert found.grade is Grade.ASSIST
    assert "--train" in found.reasons[0]


def test_the_least_favourable_of_several_counts() -> None:
    grades = [Grade.SHIP, Grade.ASSIST, Grade.REJECT, Grade.SHORTCUT]
    verdicts = {grade.value: Verdict(grade, None, "", ()) for grade in grades}
    for worst in range(1, 5):
        assert least(dict(list(verdicts.items())[:worst])).grade is grades[worst - 1]
