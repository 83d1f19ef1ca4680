"""How well scores separate labels: AUROC and true-positive rate at a false-positive rate, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

__all__ = ["Estimate", "Quality", "auroc", "measure", "positive_value", "tpr_at_fpr"]

Float64 = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Statistic = Callable[[Float64, Labels], float]

_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def rounded(self) -> list[float]:
        """[value, low, high] to three places."""
        return [round(self.value, 3), round(self.low, 3), round(self.high, 3)]


@dataclass(frozen=True, slots=True)
class Quality:
    """What is reported of one scorer on one set."""

    auroc: Estimate
    tpr_at_1_percent: Estimate

    def report(self) -> dict[str, Any]:
        """As it stands on a card."""
        return {"auroc": self.auroc.rounded(), "tpr_at_fpr_0.01": self.tpr_at_1_percent.rounded()}


def auroc(scores: Float64, labels: Labels) -> float:
    """Chance that a positive scores above a negative; ties count half.

    Args:
        scores: (n,), minus infinity allowed.
        labels: (n,), 0 or 1, both present.
    """
    positives = int(labels.sum())
    negatives = labels.size - positives
    ranks = rankdata(scores)
    return float((ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def tpr_at_fpr(scores: Float64, labels: Labels, target: float = 0.01) -> float:
    """Share of positives above the lowest threshold that at most ``target`` of these negatives exceed."""
    negatives = np.sort(scores[labels == 0])[::-1]
    threshold = negatives[int(target * negatives.size)]
    return float(np.mean(scores[labels == 1] > threshold))


def measure(scores: Float64, labels: Labels, *, seed: int) -> Quality:
    """AUROC and TPR at 1 % FPR with percentile intervals over 1,000 resamples, each label drawn by itself."""
    generator = np.random.default_rng(seed)
    positives, negatives = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    draws = []
    for _ in range(_RESAMPLES):
        rows = np.concatenate(
            [generator.choice(positives, positives.size), generator.choice(negatives, negatives.size)]
        )
        draws.append((auroc(scores[rows], labels[rows]), tpr_at_fpr(scores[rows], labels[rows])))
    low, high = np.percentile(np.array(draws), [2.5, 97.5], axis=0)
    return Quality(
        Estimate(auroc(scores, labels), float(low[0]), float(high[0])),
        Estimate(tpr_at_fpr(scores, labels), float(low[1]), float(high[1])),
    )


def positive_value(tpr: float, fpr: float, prevalence: float) -> float:
    """Of all alarms, the share that is right when ``prevalence`` of the requests are positive."""
    right = tpr * prevalence
    wrong = fpr * (1.0 - prevalence)
    return right / (right + wrong) if right + wrong > 0 else 0.0
