"""How well scores separate labels: AUROC and true-positive rate at a false-positive rate, with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

__all__ = ["Estimate", "Quality", "auroc", "measure", "positive_value", "tpr_at_fpr"]

Float64 = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

_RESAMPLES = 1000
_TARGET = 0.01
_BAND = (2.5, 97.5)


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


def tpr_at_fpr(scores: Float64, labels: Labels, target: float = _TARGET) -> float:
    """Share of positives above the lowest threshold that at most ``target`` of these negatives exceed."""
    negatives = np.sort(scores[labels == 0])[::-1]
    threshold = negatives[int(target * negatives.size)]
    return float(np.mean(scores[labels == 1] > threshold))


def measure(scores: Float64, labels: Labels, *, seed: int) -> Quality:
    """AUROC and TPR at 1 % FPR with percentile intervals over 1,000 resamples, each label drawn by itself."""
    positives, negatives = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])[::-1]
    generator = np.random.default_rng(seed)
    # How often each row is drawn in each resample: (resamples, rows).
    drawn_positives = _draw(generator, positives.size)
    drawn_negatives = _draw(generator, negatives.size)
    wins = (positives[:, None] > negatives[None, :]) + 0.5 * (positives[:, None] == negatives[None, :])
    areas = np.einsum("rn,rn->r", drawn_positives @ wins, drawn_negatives) / (positives.size * negatives.size)
    allowed = int(_TARGET * negatives.size)
    thresholds = negatives[np.argmax(np.cumsum(drawn_negatives, axis=1) > allowed, axis=1)]
    below = np.searchsorted(positives, thresholds, side="right")
    up_to = np.concatenate([np.zeros((_RESAMPLES, 1)), np.cumsum(drawn_positives, axis=1)], axis=1)
    rates = 1.0 - up_to[np.arange(_RESAMPLES), below] / positives.size
    return Quality(_estimate(auroc(scores, labels), areas), _estimate(tpr_at_fpr(scores, labels, _TARGET), rates))


def positive_value(tpr: float, fpr: float, prevalence: float) -> float:
    """Of all alarms, the share that is right when ``prevalence`` of the requests are positive."""
    right = tpr * prevalence
    wrong = fpr * (1.0 - prevalence)
    return right / (right + wrong) if right + wrong > 0 else 0.0


def _draw(generator: np.random.Generator, count: int) -> Float64:
    drawn: Float64 = generator.multinomial(count, np.full(count, 1.0 / count), size=_RESAMPLES).astype(np.float64)
    return drawn


def _estimate(value: float, resampled: Float64) -> Estimate:
    low, high = np.percentile(resampled, _BAND)
    return Estimate(value, float(low), float(high))
