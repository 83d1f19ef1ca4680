"""Probes that cannot know anything, on the folds of the training rows: what a fold's figures are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from probes.fit.evaluation.baselines import random_probes
from probes.fit.evaluation.controls import Control
from probes.fit.evaluation.model_controls import NUM_RANDOM, NUM_SHUFFLED
from probes.fit.rows.split import Fold
from probes.fit.training.linear_probe import Float64, Labels, LinearProbe
from probes.fit.training.search import Candidate, Features

__all__ = ["fold_controls"]


def fold_controls(
    setting: Candidate, features: Features, labels: Labels, folds: Sequence[Fold], *, seed: int
) -> list[Mapping[Control, Sequence[Float64]]]:
    """For each fold, the statistics of its test rows by fits on permuted labels and by random directions.

    They are scores of what is fitted on, also where another aggregate is served.

    Args:
        setting: as it is fitted.
        features: of the n training rows, in one format.
        labels: (n,).
        folds: splits of the n rows; those with the same training rows share their fits.
        seed: of the draws.
    Returns: by control, (test,) of each draw; nothing for probes over all tokens, which take too long to fit so often.
    """
    if setting.reads_tokens:
        return [{} for _ in folds]
    generator = np.random.default_rng(seed)
    drawn: dict[tuple[int, ...], dict[Control, list[LinearProbe]]] = {}
    for fold in folds:
        if fold.train not in drawn:
            drawn[fold.train] = _probes(setting, features, labels, fold.train, generator)
    found: list[Mapping[Control, Sequence[Float64]]] = []
    for fold in folds:
        test = list(fold.test)
        values, defined = features.means[test], features.defined[test]
        found.append(
            {
                control: [np.where(defined, probe.score(values), -np.inf) for probe in probes]
                for control, probes in drawn[fold.train].items()
            }
        )
    return found


def _probes(
    setting: Candidate, features: Features, labels: Labels, rows: Sequence[int], generator: np.random.Generator
) -> dict[Control, list[LinearProbe]]:
    values, known = features.some(rows), labels[list(rows)]
    fits = [setting.fit(values, generator.permutation(known)) for _ in range(NUM_SHUFFLED)]
    shuffled = [probe for probe in fits if isinstance(probe, LinearProbe)]
    # A fit's mean and scale come from its rows alone, so those of any fit are the units of the directions.
    return {
        Control.SHUFFLED_LABELS: shuffled,
        Control.RANDOM_DIRECTION: random_probes(shuffled[0], count=NUM_RANDOM, generator=generator),
    }
