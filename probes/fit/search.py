"""Chooses layer, aggregate and fitter of a linear probe over folds; knows no text and no model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from probes.aggregate import Aggregator
from probes.fit.ensemble import SideBySide
from probes.fit.fitters import Fitter
from probes.fit.linear_probe import Float64, Floats, Labels, LinearProbe
from probes.fit.measure import auroc
from probes.fit.split import Fold

__all__ = ["Candidate", "Choice", "Features", "choose"]

_FIRST_PASS = 4


@dataclass(frozen=True, slots=True)
class Candidate:
    """One setting of the search.

    Attributes:
        layers: one, or those of an ensemble, rising.
        aggregate: how token scores become the statistic.
        fitter: of the direction at each layer.
    """

    layers: tuple[int, ...]
    aggregate: Aggregator
    fitter: Fitter

    @property
    def whole_fitter(self) -> Fitter:
        """Of the probe on all layers side by side."""
        taps = len(self.layers)
        return self.fitter if taps == 1 else SideBySide(member=self.fitter, taps=taps)


@dataclass(frozen=True, slots=True)
class Features:
    """What one layer and aggregate give.

    Attributes:
        values: (n, layers * d_model), side by side.
        defined: (n,), whether the statistic has a value for the row; where not, it can never fire.
    """

    values: Floats
    defined: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Choice:
    """The setting that won, and the runners-up.

    Attributes:
        candidate: the winner.
        fold_scores: held-out scores of the winner, one array per fold, in the order of its test rows.
        table: mean AUROC over the folds of every setting that was tried.
        fitted_on: the aggregate whose means it was fitted on, where another one is served.
        served: mean AUROC over the folds of every aggregate that was tried on the winner's token scores.
    """

    candidate: Candidate
    fold_scores: tuple[Float64, ...]
    table: dict[Candidate, float]
    fitted_on: Aggregator | None = None
    served: dict[Aggregator, float] = field(default_factory=dict)

    def served_as(
        self, aggregate: Aggregator, fold_scores: tuple[Float64, ...], served: dict[Aggregator, float]
    ) -> Choice:
        """The same probe under another aggregate, with its scores on the folds."""
        place = self.candidate
        candidate = Candidate(place.layers, aggregate, place.fitter)
        return Choice(candidate, fold_scores, self.table, place.aggregate, served)


def choose(
    features_at: Callable[[tuple[int, ...], Aggregator], Features],
    labels: Labels,
    folds: Sequence[Fold],
    *,
    layers: Sequence[int],
    aggregates: Sequence[Aggregator],
    fitters: Sequence[Fitter],
    ensembles: Sequence[int] = (),
    progress: Callable[[str], None],
) -> Choice:
    """Try layers and aggregates with the middle fitter, then all fitters on the best few, then ensembles of the best layers.

    The highest mean AUROC wins. Equal settings: fewer layers, then the first fitter, the lower layer, the first
    aggregate.

    Args:
        features_at: (layers, aggregate) -> features of the n rows.
        labels: (n,).
        folds: splits of the n rows; those with the same training rows share one fit.
        layers: to try.
        aggregates: to try.
        fitters: to try, those that are preferred first.
        ensembles: how many of the best layers to average, with the best aggregate and fitter.
        progress: told how far it is.
    """
    scores: dict[Candidate, tuple[Float64, ...]] = {}
    table: dict[Candidate, float] = {}

    def attempt(candidate: Candidate) -> None:
        if candidate in table:
            return
        features = features_at(candidate.layers, candidate.aggregate)
        fitted: dict[tuple[int, ...], LinearProbe] = {}
        held_out = []
        for fold in folds:
            if fold.train not in fitted:
                rows = list(fold.train)
                fitted[fold.train] = candidate.whole_fitter.fit(features.values[rows], labels[rows])
            test = list(fold.test)
            found = fitted[fold.train].score(features.values[test])
            held_out.append(np.where(features.defined[test], found, -np.inf))
        scores[candidate] = tuple(held_out)
        table[candidate] = float(
            np.mean([auroc(s, labels[list(f.test)]) for s, f in zip(held_out, folds, strict=True)])
        )

    middle = fitters[len(fitters) // 2]
    for layer in layers:
        for aggregate in aggregates:
            attempt(Candidate((layer,), aggregate, middle))
        progress(f"search: layer {layer} tried, best mean AUROC so far {max(table.values()):.3f}")
    best_places = sorted(table, key=lambda c: -table[c])[:_FIRST_PASS]
    for place, fitter in itertools.product(best_places, fitters):
        attempt(Candidate(place.layers, place.aggregate, fitter))

    def winner_so_far() -> Candidate:
        return min(
            table,
            key=lambda c: (
                -round(table[c], 4),
                len(c.layers),
                fitters.index(c.fitter),
                c.layers,
                aggregates.index(c.aggregate),
            ),
        )

    single = winner_so_far()
    ranked = sorted(layers, key=lambda layer: -max(table[c] for c in table if c.layers == (layer,)))
    for count in ensembles:
        if 1 < count <= len(layers):
            attempt(Candidate(tuple(sorted(ranked[:count])), single.aggregate, single.fitter))
    winner = winner_so_far()
    progress(f"search: layers {list(winner.layers)}, {winner.aggregate}, {winner.fitter}: {table[winner]:.3f}")
    return Choice(winner, scores[winner], table)
