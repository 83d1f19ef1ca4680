"""Chooses the aggregate that is served of a probe that was fitted on means: any one, also a maximum; knows no text.

A probe that is fitted on means and served under another aggregate is common practice in streaming detectors ("train on
mean-pooled, aggregate at inference"): what it finds in a whole request it also finds in the tokens that say it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from probes.aggregate import Aggregator
from probes.card import Format
from probes.fit.evaluation.evaluate import labels_of
from probes.fit.evaluation.measure import auroc
from probes.fit.reading.activations import Activations
from probes.fit.reading.scores import statistic_of
from probes.fit.rows.split import Fold
from probes.fit.training.linear_probe import Float64, LinearProbe
from probes.fit.training.search import Choice
from probes.fit.training.session import FitSession

__all__ = ["choose_served"]


def choose_served(
    session: FitSession, choice: Choice, read: dict[Format, Activations], folds: Sequence[Fold]
) -> Choice:
    """Try every aggregate of ``search.serve`` on the token scores of the winner's folds; highest mean AUROC wins.

    Args:
        session: rows and reader.
        choice: layer, fitter, and the aggregate that was fitted on.
        read: means of the training rows in each training format.
        folds: splits of the training rows.
    Returns: the choice with the served aggregate in the winner's place and its scores on the folds; as it came where
        the recipe names nothing to serve, or the winner has an aggregate of its own.
    """
    aggregates = session.recipe.search.serve
    if not aggregates or choice.candidate.reads_tokens:
        return choice
    labels = labels_of(session.data.train)
    probes = _probes_of_folds(choice, read, labels, folds)
    found: dict[Aggregator, list[Float64]] = {aggregate: [] for aggregate in aggregates}
    for text_format in read:
        layers = choice.candidate.layers
        tokens = session.read_tokens(session.data.train, text_format, layers, "tokens of training rows")
        scores = tokens.token_scores(probes)
        for place, fold in enumerate(folds):
            for aggregate in aggregates:
                statistics = [statistic_of(aggregate, tokens.stage, scores[i][:, place]) for i in fold.test]
                found[aggregate].append(np.array(statistics))
    tests = [labels[list(fold.test)] for _ in read for fold in folds]
    means = {
        aggregate: float(np.mean([auroc(s, t) for s, t in zip(statistics, tests, strict=True)]))
        for aggregate, statistics in found.items()
    }
    best = max(aggregates, key=lambda aggregate: round(means[aggregate], 4))
    for aggregate in aggregates:
        session.progress(f"served as {aggregate}: {means[aggregate]:.3f}")
    return choice.served_as(best, tuple(found[best]), means)


def _probes_of_folds(
    choice: Choice, read: dict[Format, Activations], labels: np.ndarray, folds: Sequence[Fold]
) -> list[LinearProbe]:
    fitted: dict[tuple[int, ...], LinearProbe] = {}
    place = choice.candidate
    features = [activations.side_by_side(place.layers, place.aggregate) for activations in read.values()]
    for fold in folds:
        if fold.train not in fitted:
            rows = list(fold.train)
            probe = place.fit(np.concatenate([part[rows] for part in features]), np.tile(labels[rows], len(features)))
            if not isinstance(probe, LinearProbe):  # pragma: no cover - those that read tokens are not asked for
                raise TypeError(f"{place.fitter} makes no linear probe")
            fitted[fold.train] = probe
    return [fitted[fold.train] for fold in folds]
