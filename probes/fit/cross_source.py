"""How a fit does away from home: each source held out in turn, and beside it a careless split of the same rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedKFold

from probes.fit.baselines import TextPeer, labels_of
from probes.fit.controls import Control
from probes.fit.evaluation import FoldReport, LeaveOneOut
from probes.fit.example import Example
from probes.fit.measure import Estimate, Measurer, auroc
from probes.fit.split import Fold

__all__ = ["FoldScores", "in_distribution", "leave_one_out", "peer_scores", "random_folds", "source_folds"]

Float64 = npt.NDArray[np.float64]

_MOST_FOLDS = 8
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


def source_folds(examples: Sequence[Example]) -> list[Fold]:
    """Leave each source of positives out, with all of its rows.

    A source without enough negatives of its own is tested against negatives of other sources, which are held out by
    group. No group stands on two sides. With more than eight sources of positives the smaller ones are held out
    together.

    Returns: empty where positives have one source alone, or too few rows are left on a side.
    """
    counts = Counter(example.source for example in examples if example.label)
    names = [source for source, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    if len(names) < 2:  # noqa: PLR2004 - one must be left
        return []
    parts = [names[place::_MOST_FOLDS] for place in range(min(_MOST_FOLDS, len(names)))]
    folds = (_fold(examples, part, place, len(parts)) for place, part in enumerate(parts))
    return [fold for fold in folds if fold is not None]


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


def _fold(examples: Sequence[Example], sources: Sequence[str], place: int, count: int) -> Fold | None:
    test = {i for i, example in enumerate(examples) if example.source in sources}
    own = sum(examples[i].label == 0 for i in test)
    if own < _FEWEST:
        test |= {
            i for i, example in enumerate(examples) if not example.label and _share(example.group, count) == place
        }
    groups = {examples[i].group for i in test}
    train = [i for i, example in enumerate(examples) if i not in test and example.group not in groups]
    for side in (test, train):
        positives = sum(examples[i].label for i in side)
        if min(positives, len(side) - positives) < _FEWEST:
            return None
    return Fold(" + ".join(sources), tuple(train), tuple(sorted(test)))


def _share(group: str, count: int) -> int:
    return int.from_bytes(hashlib.sha256(f"held out/{group}".encode()).digest()[:8], "big") % count
