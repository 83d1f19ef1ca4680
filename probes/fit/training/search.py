"""Chooses layer, aggregate and fitter of a linear probe over folds; knows no text and no model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from probes.aggregate import Aggregator
from probes.fit.evaluation.measure import auroc
from probes.fit.fitters import Fitter
from probes.fit.reading.sequences import Sequences
from probes.fit.rows.split import Fold
from probes.fit.token_fitters import TokenFitter, TokenProbe
from probes.fit.training.ensemble import SideBySide
from probes.fit.training.linear_probe import Float64, Floats, Labels, LinearProbe

__all__ = ["Candidate", "Choice", "Features", "Probe", "Values", "choose", "score_values"]

_FIRST_PASS = 4


Values = Floats | Sequences
Probe = LinearProbe | TokenProbe


def score_values(probe: Probe, values: Values) -> Float64:
    """(n,) what a probe says of what it was fitted on, or of more of that.

    Raises:
        TypeError: means for a token probe, or tokens for another.
    """
    if isinstance(probe, TokenProbe) and isinstance(values, Sequences):
        return probe.score(values)
    if isinstance(probe, LinearProbe) and not isinstance(values, Sequences):
        return probe.score(values)
    raise TypeError(f"{type(probe).__name__} does not score {type(values).__name__}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One setting of the search.

    Attributes:
        layers: one, or those of an ensemble, rising.
        aggregate: how token scores become the statistic; a token fitter's own.
        fitter: of the direction at each layer, or of a probe over all tokens at one.
    """

    layers: tuple[int, ...]
    aggregate: Aggregator
    fitter: Fitter | TokenFitter

    @property
    def reads_tokens(self) -> bool:
        """Whether it is fitted on all tokens, not on their means."""
        return isinstance(self.fitter, TokenFitter)

    def fit(self, values: Values, labels: Labels) -> Probe:
        """A probe on all layers side by side, or on all tokens.

        Args:
            values: as ``Features`` holds them.
            labels: (n,), 0 or 1, both present.
        Raises:
            TypeError: means for a token fitter, or tokens for another.
        """
        if isinstance(self.fitter, TokenFitter) and isinstance(values, Sequences):
            return self.fitter.fit(values, labels)
        if isinstance(self.fitter, Fitter) and not isinstance(values, Sequences):
            taps = len(self.layers)
            return (self.fitter if taps == 1 else SideBySide(member=self.fitter, taps=taps)).fit(values, labels)
        raise TypeError(f"{self.fitter} is not fitted on {type(values).__name__}")


@dataclass(frozen=True, slots=True)
class Features:
    """What one layer and aggregate give.

    Attributes:
        values: (n, layers * d_model), side by side; or the tokens of n requests.
        defined: (n,), whether the statistic has a value for the row; where not, it can never fire.
    """

    values: Values
    defined: npt.NDArray[np.bool_]

    @property
    def means(self) -> Floats:
        """The values of a setting that is fitted on means.

        Raises:
            TypeError: they are tokens.
        """
        if isinstance(self.values, Sequences):
            raise TypeError("these are tokens: they have no means yet")
        return self.values

    def some(self, index: Sequence[int]) -> Values:
        """The values of these rows."""
        return self.values.some(index) if isinstance(self.values, Sequences) else self.values[list(index)]


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

    @property
    def fitted(self) -> Candidate:
        """The setting as it is fitted."""
        place = self.candidate
        return Candidate(place.layers, self.fitted_on or place.aggregate, place.fitter)

    def served_as(
        self, aggregate: Aggregator, fold_scores: tuple[Float64, ...], served: dict[Aggregator, float]
    ) -> Choice:
        """The same probe under another aggregate, with its scores on the folds."""
        place = self.candidate
        candidate = Candidate(place.layers, aggregate, place.fitter)
        return Choice(candidate, fold_scores, self.table, place.aggregate, served)


def choose(
    features_at: Callable[[Candidate], Features],
    labels: Labels,
    folds: Sequence[Fold],
    *,
    layers: Sequence[int],
    aggregates: Sequence[Aggregator],
    fitters: Sequence[Fitter],
    ensembles: Sequence[int] = (),
    token_fitters: Sequence[TokenFitter] = (),
    progress: Callable[[str], None],
) -> Choice:
    """Try layers and aggregates with the middle fitter, then all fitters on the best few, then what reads more.

    That is ensembles of the best layers, and probes over all tokens at the best one. The highest mean AUROC wins. Equal
    settings: fewer layers, then the first fitter, the lower layer, the first aggregate.

    Args:
        features_at: what a setting is fitted on, of the n rows.
        labels: (n,).
        folds: splits of the n rows; those with the same training rows share one fit.
        layers: to try.
        aggregates: to try.
        fitters: to try, those that are preferred first.
        ensembles: how many of the best layers to average, with the best aggregate and fitter.
        token_fitters: to try at the best layer.
        progress: told how far it is.
    """
    scores: dict[Candidate, tuple[Float64, ...]] = {}
    table: dict[Candidate, float] = {}

    def attempt(candidate: Candidate) -> None:
        if candidate in table:
            return
        features = features_at(candidate)
        fitted: dict[tuple[int, ...], Probe] = {}
        held_out = []
        for fold in folds:
            if fold.train not in fitted:
                fitted[fold.train] = candidate.fit(features.some(fold.train), labels[list(fold.train)])
            test = list(fold.test)
            found = score_values(fitted[fold.train], features.some(test))
            held_out.append(np.where(features.defined[test], found, -np.inf))
        scores[candidate] = tuple(held_out)
        table[candidate] = float(
            np.mean([auroc(s, labels[list(f.test)]) for s, f in zip(held_out, folds, strict=True)])
        )

    order = [*fitters, *token_fitters]
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
                order.index(c.fitter),
                c.layers,
                aggregates.index(c.aggregate) if c.aggregate in aggregates else 0,
            ),
        )

    single = winner_so_far()
    ranked = sorted(layers, key=lambda layer: -max(table[c] for c in table if c.layers == (layer,)))
    for count in ensembles:
        if 1 < count <= len(layers):
            attempt(Candidate(tuple(sorted(ranked[:count])), single.aggregate, single.fitter))
    for token_fitter in token_fitters:
        attempt(Candidate((ranked[0],), token_fitter.aggregate, token_fitter))
        progress(f"search: {token_fitter} tried, best mean AUROC so far {max(table.values()):.3f}")
    winner = winner_so_far()
    progress(f"search: layers {list(winner.layers)}, {winner.aggregate}, {winner.fitter}: {table[winner]:.3f}")
    return Choice(winner, scores[winner], table)
