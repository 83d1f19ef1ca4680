"""Fits a linear probe: logistic regression on standardised features, chosen over folds; knows no text and no model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from probes.aggregate import Aggregator
from probes.fit.measure import auroc
from probes.fit.split import Fold

__all__ = ["Candidate", "Choice", "Features", "LinearProbe", "choose", "fit_linear"]

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

_SMALLEST_SCALE = 1e-6
_MAX_ITERATIONS = 2000
_FIRST_PASS = 4


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """score = direction . (s - mean) / scale + bias.

    Attributes:
        direction: (d_model,) float32, in standardised units.
        mean: (d_model,) float32.
        scale: (d_model,) float32, positive.
        bias: of the score.
    """

    direction: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    bias: float

    def tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """As an artifact of kind ``linear`` holds them."""
        return {
            "direction": self.direction,
            "mean": self.mean,
            "scale": self.scale,
            "bias": np.array([self.bias], dtype=np.float32),
        }

    def score(self, features: Floats) -> Float64:
        """Map (n, d_model) to (n,), as the served detector does: constants folded in float64."""
        weight = self.direction.astype(np.float64) / self.scale.astype(np.float64)
        bias = float(np.float32(self.bias)) - float(self.mean.astype(np.float64) @ weight)
        scores: Float64 = features.astype(np.float64) @ weight + bias
        return scores


def fit_linear(features: Floats, labels: Labels, *, inverse_penalty: float) -> LinearProbe:
    """Logistic regression with L2 penalty, both classes weighted alike.

    Args:
        features: (n, d_model).
        labels: (n,), 0 or 1, both present.
        inverse_penalty: C; small is strong.
    """
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    scale = features.std(axis=0, dtype=np.float64).astype(np.float32)
    scale = np.where(scale > _SMALLEST_SCALE, scale, np.float32(1.0)).astype(np.float32)
    standardised = (features.astype(np.float64) - mean) / scale
    model = LogisticRegression(C=inverse_penalty, class_weight="balanced", max_iter=_MAX_ITERATIONS)
    model.fit(standardised, labels)
    return LinearProbe(model.coef_[0].astype(np.float32), mean, scale, float(model.intercept_[0]))


@dataclass(frozen=True, slots=True)
class Candidate:
    """One setting of the search."""

    layer: int
    aggregate: Aggregator
    inverse_penalty: float


@dataclass(frozen=True, slots=True)
class Features:
    """What one layer and aggregate give.

    Attributes:
        values: (n, d_model).
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
    """

    candidate: Candidate
    fold_scores: tuple[Float64, ...]
    table: dict[Candidate, float]


def choose(
    features_at: Callable[[int, Aggregator], Features],
    labels: Labels,
    folds: Sequence[Fold],
    *,
    layers: Sequence[int],
    aggregates: Sequence[Aggregator],
    inverse_penalties: Sequence[float],
    progress: Callable[[str], None],
) -> Choice:
    """Try layers and aggregates at the middle penalty, then all penalties on the best few; highest mean AUROC wins.

    Equal settings: the stronger penalty, then the lower layer, then the first aggregate.

    Args:
        features_at: (layer, aggregate) -> features of the n rows.
        labels: (n,).
        folds: splits of the n rows; those with the same training rows share one fit.
        layers: to try.
        aggregates: to try.
        inverse_penalties: to try.
        progress: told how far it is.
    """
    scores: dict[Candidate, tuple[Float64, ...]] = {}
    table: dict[Candidate, float] = {}

    def attempt(candidate: Candidate) -> None:
        if candidate in table:
            return
        features = features_at(candidate.layer, candidate.aggregate)
        fitted: dict[tuple[int, ...], LinearProbe] = {}
        held_out = []
        for fold in folds:
            if fold.train not in fitted:
                rows = list(fold.train)
                fitted[fold.train] = fit_linear(
                    features.values[rows], labels[rows], inverse_penalty=candidate.inverse_penalty
                )
            test = list(fold.test)
            found = fitted[fold.train].score(features.values[test])
            held_out.append(np.where(features.defined[test], found, -np.inf))
        scores[candidate] = tuple(held_out)
        table[candidate] = float(
            np.mean([auroc(s, labels[list(f.test)]) for s, f in zip(held_out, folds, strict=True)])
        )

    ordered = sorted(inverse_penalties)
    middle = ordered[len(ordered) // 2]
    for layer in layers:
        for aggregate in aggregates:
            attempt(Candidate(layer, aggregate, middle))
        progress(f"search: layer {layer} tried, best mean AUROC so far {max(table.values()):.3f}")
    best_places = sorted(table, key=lambda c: -table[c])[:_FIRST_PASS]
    for place, penalty in itertools.product(best_places, ordered):
        attempt(Candidate(place.layer, place.aggregate, penalty))
    winner = min(table, key=lambda c: (-round(table[c], 4), c.inverse_penalty, c.layer, aggregates.index(c.aggregate)))
    progress(f"search: layer {winner.layer}, {winner.aggregate}, C {winner.inverse_penalty:g}: {table[winner]:.3f}")
    return Choice(winner, scores[winner], table)
