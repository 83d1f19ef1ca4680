"""From a statistic to a probability: Platt scaling, measured on rows that it was not fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from probes.card import Platt
from probes.errors import TelltaleError
from probes.fit.evaluation.reliability import reliability
from probes.fit.rows.example import Example, data_digest

__all__ = ["PlattError", "Sigmoid", "fit_platt", "fit_sigmoid"]

Float64 = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

_FOLDS = 5


class PlattError(TelltaleError, ValueError):
    """There are too few labelled requests to scale a statistic."""


@dataclass(frozen=True, slots=True)
class Sigmoid:
    """1 / (1 + exp(-(slope * statistic + intercept)))."""

    slope: float
    intercept: float

    def probability(self, statistics: Float64) -> Float64:
        """(n,) in [0, 1]; 0 for minus infinity where the slope is positive."""
        found: Float64 = expit(self.slope * statistics + self.intercept)
        return found


def fit_platt(statistics: Float64, examples: Sequence[Example]) -> Platt:
    """Scale a statistic by labelled requests, and measure that on rows that it was not fitted on.

    The errors are taken over five folds by group, each scaled by the other four; the numbers on the card are fitted on
    all rows.

    Args:
        statistics: (n,); rows where it is not defined (minus infinity) are left out: they never fire.
        examples: the n labelled requests.
    Raises:
        PlattError: fewer than five groups of a label.
    """
    defined = np.isfinite(statistics)
    rows = [example for example, kept in zip(examples, defined, strict=True) if kept]
    scores, labels = statistics[defined], np.array([example.label for example in rows], dtype=np.int64)
    groups = [example.group for example in rows]
    for label in (0, 1):
        found = len({group for group, kept in zip(groups, labels == label, strict=True) if kept})
        if found < _FOLDS:
            raise PlattError(
                f"{found} groups of labelled requests have the label {label}; {_FOLDS} are the fewest that a statistic "
                "can be scaled by. Add labelled rows, or leave --labelled out."
            )
    held_out = np.empty(scores.size)
    for train, test in StratifiedGroupKFold(_FOLDS).split(scores, labels, groups):
        held_out[test] = fit_sigmoid(scores[train], labels[train]).probability(scores[test])
    whole = fit_sigmoid(scores, labels)
    return Platt(
        slope=whole.slope,
        intercept=whole.intercept,
        num_positive=int(labels.sum()),
        num_negative=int(labels.size - labels.sum()),
        ece_before=reliability(expit(scores), labels).error,
        ece_after=reliability(held_out, labels).error,
        data_digest=data_digest(rows),
    )


def fit_sigmoid(statistics: Float64, labels: Labels) -> Sigmoid:
    """Platt's sigmoid (1999) with the targets of Lin, Lin & Weng (2007), which stay off 0 and 1.

    A target between 0 and 1 is the same as both labels with weights: so plain logistic regression fits it.

    Args:
        statistics: (n,) finite.
        labels: (n,) 0 or 1, both present.
    """
    positives = int(labels.sum())
    negatives = labels.size - positives
    targets = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    # In units of the spread: the solver stops by the size of the gradient.
    center, spread = float(statistics.mean()), float(statistics.std()) or 1.0
    features = np.tile((statistics - center) / spread, 2)[:, None]
    both = np.repeat([1, 0], labels.size)
    weights = np.concatenate([targets, 1 - targets])
    fitted = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    fitted.fit(features, both, sample_weight=weights)
    slope = float(fitted.coef_[0, 0]) / spread
    return Sigmoid(slope, float(fitted.intercept_[0]) - slope * center)
