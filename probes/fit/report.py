"""What stands on the card as ``evaluation``: which rows are scored, and beside which baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from probes.card import Calibration, Format
from probes.fit.evaluate import ControlProbes, TestSet, at_threshold, compare, labels_of, text_baseline_scores, verdict
from probes.fit.linear_probe import LinearProbe
from probes.fit.measure import measure
from probes.fit.search import Candidate, Choice
from probes.fit.session import FitSession, statistics_of
from probes.fit.split import Fold, length_matched_pairs

__all__ = ["development", "leave_one_out"]


def leave_one_out(
    session: FitSession, choice: Choice, folds: Sequence[Fold], formats: Sequence[Format]
) -> dict[str, Any]:
    """Each source of positives held out in turn; layer, aggregate and C were chosen on these same folds.

    Args:
        session: rows.
        choice: its scores are those of every fold in the first format, then in the next.
        folds: splits of the training rows.
        formats: that were trained on.
    """
    rows = session.data.train
    tested = [[rows[i] for i in fold.test] for fold in folds]
    text_scores = [
        text_baseline_scores([rows[i] for i in fold.train], test) for fold, test in zip(folds, tested, strict=True)
    ]
    report: dict[str, Any] = {}
    for copy, text_format in enumerate(formats):
        scores = choice.fold_scores[copy * len(folds) : (copy + 1) * len(folds)]
        report[text_format.value] = {
            fold.name: compare(
                TestSet(examples=test, scores=found, text_scores=text, controls=ControlProbes()),
                seed=session.recipe.seed,
            )
            for fold, test, found, text in zip(folds, tested, scores, text_scores, strict=True)
        }
    return report


def development(
    session: FitSession,
    probe: LinearProbe,
    candidate: Candidate,
    calibration: Calibration,
    controls: dict[str, list[LinearProbe]],
) -> dict[str, Any]:
    """The finished detector on rows of other sources, in the format of one calibration.

    Args:
        session: rows and reader.
        probe: the detector.
        candidate: layer, aggregate and penalty it was fitted with.
        calibration: its threshold.
        controls: probes that cannot know anything, by name: ``shuffled`` and ``random``.
    """
    recipe, data = session.recipe, session.data
    rows = [*data.pairs, *data.hard_benign]
    if not rows:
        return {}
    read = session.read(rows, calibration.format, "development rows")
    statistics = statistics_of(probe, read, candidate)
    text_scores = text_baseline_scores(data.train, rows)
    place = {id(example): i for i, example in enumerate(rows)}
    drawn = {name: [statistics_of(p, read, candidate) for p in probes] for name, probes in controls.items()}
    tolerance = recipe.development.length_tolerance
    harmful = [example for example in data.pairs if example.label]
    sets = {
        "pairs": data.pairs,
        "pairs_length_matched": length_matched_pairs(data.pairs, tolerance),
        "against_hard_benign_length_matched": length_matched_pairs([*harmful, *data.hard_benign], tolerance),
    }
    report: dict[str, Any] = {}
    for name, examples in sets.items():
        labels = labels_of(examples)
        if labels.size == 0 or labels.min() == labels.max():
            continue
        index = [place[id(example)] for example in examples]
        chosen = ControlProbes(
            shuffled=[scores[index] for scores in drawn["shuffled"]],
            random=[scores[index] for scores in drawn["random"]],
        )
        report[name] = compare(
            TestSet(examples=examples, scores=statistics[index], text_scores=text_scores[index], controls=chosen),
            seed=recipe.seed,
        )
    matched = [place[id(example)] for example in sets["pairs_length_matched"]]
    if matched:
        labels = labels_of(sets["pairs_length_matched"])
        report["verdict"] = verdict(
            measure(statistics[matched], labels, seed=recipe.seed),
            measure(text_scores[matched], labels, seed=recipe.seed),
        )
    named = {"pairs": len(data.pairs), "hard_benign": len(data.hard_benign)}
    ends = np.cumsum([0, *named.values()])
    labels = labels_of(rows)
    report["at_threshold"] = at_threshold(
        calibration,
        {
            name: (statistics[start:end], labels[start:end])
            for name, start, end in zip(named, ends[:-1], ends[1:], strict=True)
            if end > start
        },
    )
    return report
