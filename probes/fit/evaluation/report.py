"""What stands on the card as ``evaluation``: which rows are scored, and beside which baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from probes.card import Calibration, Format
from probes.fit.evaluation.baselines import TextPeer
from probes.fit.evaluation.controls import Control
from probes.fit.evaluation.cross_source import FoldScores, in_distribution, leave_one_out, peer_scores, random_folds
from probes.fit.evaluation.evaluate import ScoredRows, at_threshold, compare, labels_of, limits_of, trivial_in
from probes.fit.evaluation.evaluation import SplitPolicy
from probes.fit.evaluation.fold_controls import fold_controls
from probes.fit.evaluation.weigh import Home, weigh, weigh_folds
from probes.fit.rows.split import Fold, length_matched_pairs
from probes.fit.training.linear_probe import Float64, Labels
from probes.fit.training.search import Candidate, Choice, Features, Probe, score_values
from probes.fit.training.session import FitSession, statistics_of

__all__ = ["Trained", "development", "training_rows"]


@dataclass(frozen=True, slots=True)
class Trained:
    """What the training rows tell of a fit, in each format that was trained on.

    Attributes:
        report: for the card: the figures of every fold, by format and source.
        home: for the verdict, by format.
    """

    report: Mapping[str, Any]
    home: Mapping[Format, Home]


def training_rows(
    session: FitSession,
    choice: Choice,
    folds: Sequence[Fold],
    formats: Sequence[Format],
    *,
    peers: Sequence[TextPeer],
) -> Trained:
    """Each source of positives held out in turn; layer, aggregate and fitter were chosen on these same folds.

    Beside it stands the same fit on a careless split: the distance between the two is what tells a shortcut.

    Args:
        session: rows.
        choice: its scores are those of every fold in the first format, then in the next.
        folds: splits of the training rows.
        formats: that were trained on.
        peers: the text-only classifiers that it is held against.
    """
    rows, seed = session.data.train, session.recipe.seed
    texts = peer_scores(peers, rows, folds)
    careless = random_folds(rows, seed=seed)
    setting, labels = choice.fitted, labels_of(rows)
    report: dict[str, Any] = {}
    homes = {}
    for copy, text_format in enumerate(formats):
        scores = choice.fold_scores[copy * len(folds) : (copy + 1) * len(folds)]
        found = [
            FoldScores(fold=fold, detector=statistics, peers=read)
            for fold, statistics, read in zip(folds, scores, texts, strict=True)
        ]
        features = session.features(rows, text_format, setting, "training rows")
        controls = fold_controls(setting, features, labels, folds, seed=seed)
        report[text_format.value] = {
            each.fold.name: compare(
                ScoredRows(
                    examples=[rows[i] for i in each.fold.test],
                    scores=each.detector,
                    peers=each.peers,
                    bands=bands,
                ),
                seed=seed,
            ).card()
            for each, bands in zip(found, controls, strict=True)
        }
        at_random = [
            FoldScores(fold=fold, detector=statistics, peers={})
            for fold, statistics in zip(careless, _fold_scores(setting, features, labels, careless), strict=True)
        ]
        homes[text_format] = Home(
            leave_one_out=leave_one_out(rows, found, seed=seed),
            in_distribution=in_distribution(rows, at_random, seed=seed),
            trivial=trivial_in(rows),
        )
    return Trained(report, homes)


def development(
    session: FitSession,
    probe: Probe,
    candidate: Candidate,
    calibration: Calibration,
    *,
    controls: Mapping[Control, Sequence[Probe]],
    trained: Trained,
    peers: Sequence[TextPeer],
) -> dict[str, Any]:
    """The finished detector on rows of other sources, in the format of one calibration.

    Args:
        session: rows and reader.
        probe: the detector.
        candidate: layer, aggregate and fitter it was made with.
        calibration: its threshold.
        controls: probes that cannot know anything.
        trained: what the training rows tell.
        peers: the text-only classifiers that it is held against.
    """
    recipe, data = session.recipe, session.data
    home = trained.home.get(calibration.format, Home())
    report: dict[str, Any] = {}
    if home.in_distribution is not None:
        report["in_distribution"] = {"auroc": home.in_distribution.rounded()}
    rows = [*data.pairs, *data.hard_benign]
    if not data.pairs and (by_folds := weigh_folds(home)):
        report["verdict"] = by_folds.grade.value
        report["verdict_reasons"] = list(by_folds.reasons)
    if not rows:
        return report
    read = session.read(rows, calibration.format, "development rows")
    statistics = statistics_of(probe, read, candidate)
    texts = {peer.control: peer.scores(data.train, rows) for peer in peers}
    place = {id(example): i for i, example in enumerate(rows)}
    drawn = {name: [statistics_of(each, read, candidate) for each in probes] for name, probes in controls.items()}
    tolerance = recipe.development.length_tolerance
    harmful = [example for example in data.pairs if example.label]
    sets = {
        "pairs": data.pairs,
        "pairs_length_matched": length_matched_pairs(data.pairs, tolerance),
        "against_hard_benign_length_matched": length_matched_pairs([*harmful, *data.hard_benign], tolerance),
    }
    for name, examples in sets.items():
        labels = labels_of(examples)
        if labels.size == 0 or labels.min() == labels.max():
            continue
        index = [place[id(example)] for example in examples]
        table = compare(
            ScoredRows(
                examples=examples,
                scores=statistics[index],
                peers={control: scores[index] for control, scores in texts.items()},
                bands={control: [scores[index] for scores in some] for control, some in drawn.items()},
            ),
            seed=recipe.seed,
        )
        report[name] = table.card()
        if name == "pairs_length_matched":
            found = weigh(table, SplitPolicy.HELD_OUT_SOURCES, home)
            report["verdict"] = found.grade.value
            report["verdict_reasons"] = list(found.reasons)
    named = {"pairs": len(data.pairs), "hard_benign": len(data.hard_benign)}
    ends = np.cumsum([0, *named.values()])
    labels = labels_of(rows)
    limits = limits_of(calibration, session.lengths(rows, calibration.format))
    report["at_threshold"] = at_threshold(
        calibration,
        {
            name: (statistics[start:end], limits[start:end], labels[start:end])
            for name, start, end in zip(named, ends[:-1], ends[1:], strict=True)
            if end > start
        },
    )
    return report


def _fold_scores(setting: Candidate, features: Features, labels: Labels, folds: Sequence[Fold]) -> list[Float64]:
    """For each fold, its test rows by the chosen fit on its training rows, on what it is fitted on."""
    found = []
    for fold in folds:
        probe = setting.fit(features.some(fold.train), labels[list(fold.train)])
        test = list(fold.test)
        found.append(np.where(features.defined[test], score_values(probe, features.some(test)), -np.inf))
    return found
