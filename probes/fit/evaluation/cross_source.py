"""How a fit does away from home: each source held out in turn, and beside it a careless split of the same rows."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedKFold

from probes.fit.evaluation.baselines import TextPeer, labels_of
from probes.fit.evaluation.controls import Control
from probes.fit.evaluation.evaluation import FoldReport, LeaveOneOut
from probes.fit.evaluation.measure import Estimate, Measurer, auroc
from probes.fit.rows.example import Example
from probes.fit.rows.split import Fold, make_folds, make_source_folds

__all__ = ["FoldScores", "in_distribution", "leave_one_out", "peer_scores", "random_folds", "source_folds"]

Float64 = npt.NDArray[np.float64]

_RANDOM_FOLDS = 5
_FEWEST = 10
"""Rows of a label below which a fold tells nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldScores:
    """What was found on the rows of one fold.

    Attributes:
        fold: its split.
        detector: (test,), by the detector's fit on the fold's training rows.
        peers: likewise, by text-only classifiers.
    """

    fold: Fold
    detector: Float64
    peers: Mapping[Control, Float64]


def source_folds(examples: Sequence[Example], *, seed: int) -> list[Fold]:
    """Leave sources out, and with them every row of their groups.

    Sources that hold both labels are held out whole, one at a time; where none does, each source of positives is, with
    negatives that are held out by group. What is tested on is matched in form and length.

    Returns: empty where positives have one source alone, or too few rows are left on a side.
    """
    if len({example.source for example in examples if example.label}) < 2:  # noqa: PLR2004 - one must be left
        return []
    rng = random.Random(f"{seed}/source folds")  # noqa: S311 - a draw of examples, no secret
    folds = make_source_folds(examples, rng)
    if not folds:
        by_source = [replace(row, group=row.source) if row.label else row for row in examples]
        folds = make_folds(by_source, rng)
    apart = []
    for fold in folds:
        groups = {examples[i].group for i in fold.test}
        train = tuple(i for i in fold.train if examples[i].group not in groups)
        if all(_fewest(examples, side) >= _FEWEST for side in (train, fold.test)):
            apart.append(Fold(fold.name, train, fold.test))
    return apart


def random_folds(examples: Sequence[Example], *, seed: int) -> list[Fold]:
    """Five parts at random, each with its share of every label and source: the split that flatters."""
    strata = [f"{example.label} {example.source}" for example in examples]
    common = {stratum for stratum, count in Counter(strata).items() if count >= _RANDOM_FOLDS}
    strata = [stratum if stratum in common else stratum.split(maxsplit=1)[0] for stratum in strata]
    labels = labels_of(examples)
    if min(labels.sum(), labels.size - labels.sum()) < _RANDOM_FOLDS:
        return []
    dealt = StratifiedKFold(_RANDOM_FOLDS, shuffle=True, random_state=seed).split(strata, strata)
    return [
        Fold(f"random-{number}", tuple(train.tolist()), tuple(test.tolist()))
        for number, (train, test) in enumerate(dealt)
    ]


def peer_scores(
    peers: Sequence[TextPeer], examples: Sequence[Example], folds: Sequence[Fold]
) -> list[dict[Control, Float64]]:
    """Each peer trained on each fold's training rows and scored on its test rows."""
    sides = [([examples[i] for i in fold.train], [examples[i] for i in fold.test]) for fold in folds]
    return [{peer.control: peer.scores(train, tested) for peer in peers} for train, tested in sides]


def leave_one_out(examples: Sequence[Example], found: Sequence[FoldScores], *, seed: int) -> LeaveOneOut | None:
    """The figures of each fold and their means; None without folds.

    The mean's interval rests on resamples within each fold: other sources may differ more than these do.

    Args:
        examples: that the folds index.
        found: scores on every fold, by the same peers.
        seed: of the resamples.
    """
    if not found:
        return None
    reports, values, drawn = [], [], []
    for place, scores in enumerate(found):
        rows = [examples[i] for i in scores.fold.test]
        labels = labels_of(rows)
        measurer = Measurer(labels, [row.group for row in rows], seed=seed + place)
        each = {"": scores.detector, **{control.value: peer for control, peer in scores.peers.items()}}
        values.append({name: auroc(row, labels) for name, row in each.items()})
        drawn.append({name: measurer.areas(row) for name, row in each.items()})
        estimates = {name: Estimate.of(values[-1][name], drawn[-1][name]) for name in each}
        reports.append(
            FoldReport(
                source=scores.fold.name,
                num_positive=int(labels.sum()),
                num_negative=int(labels.size - labels.sum()),
                detector=estimates[""],
                peers={control: estimates[control.value] for control in scores.peers},
            )
        )
    means = {
        name: Estimate.of(
            float(np.mean([value[name] for value in values])), np.mean([row[name] for row in drawn], axis=0)
        )
        for name in values[0]
    }
    return LeaveOneOut(
        folds=tuple(reports),
        detector=means[""],
        peers={Control(name): estimate for name, estimate in means.items() if name},
    )


def in_distribution(examples: Sequence[Example], found: Sequence[FoldScores], *, seed: int) -> Estimate | None:
    """The mean AUROC over random folds; None without folds."""
    report = leave_one_out(examples, found, seed=seed)
    return None if report is None else report.detector


def _fewest(examples: Sequence[Example], rows: Sequence[int]) -> int:
    positives = sum(examples[i].label for i in rows)
    return min(positives, len(rows) - positives)
