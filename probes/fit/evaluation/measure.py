"""How well scores separate labels: AUROC, average precision, TPR at false-positive rates, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from probes.errors import TelltaleError
from probes.fit.evaluation.resampling import draw_clusters

__all__ = [
    "FPR_TARGETS",
    "Estimate",
    "MeasureError",
    "Measurer",
    "Quality",
    "RateAt",
    "auroc",
    "average_precision",
    "measure",
    "positive_value",
    "tpr_at_fpr",
]

Float64 = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

FPR_TARGETS = (0.05, 0.01, 0.001)
_BAND = (2.5, 97.5)
_CHUNK = 2_000_000
"""Row weights that are held in float64 at a time."""
_ROUNDING = 1e-9


class MeasureError(TelltaleError, ValueError):
    """These scores and labels allow no figure."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: Float64) -> Estimate:
        """A figure with the percentiles 2.5 and 97.5 of its resamples."""
        low, high = np.percentile(resampled, _BAND)
        return cls(value, float(low), float(high))

    def rounded(self) -> list[float]:
        """[value, low, high] to three places."""
        return [round(self.value, 3), round(self.low, 3), round(self.high, 3)]


@dataclass(frozen=True, slots=True)
class RateAt:
    """True-positive rate at the best threshold with a false-positive rate, on the very rows that it is measured on.

    Attributes:
        target_fpr: the false-positive rate.
        tpr: None where the negatives are fewer than 1 / target_fpr: not even one may then lie above the threshold,
            and none above it proves nothing.
        reason: why there is none; empty where there is one.
    """

    target_fpr: float
    tpr: Estimate | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Quality:
    """What is reported of one scorer on one set.

    Attributes:
        auroc: chance that a positive scores above a negative.
        auprc: average precision, at the share of positives of this very set.
        tpr: at each of ``FPR_TARGETS``.
    """

    auroc: Estimate
    auprc: Estimate
    tpr: tuple[RateAt, ...]

    def report(self) -> dict[str, Any]:
        """As it stands on a card; a TPR that cannot be certified is None."""
        rates = {f"tpr_at_fpr_{rate.target_fpr:g}": rate.tpr.rounded() if rate.tpr else None for rate in self.tpr}
        return {"auroc": self.auroc.rounded(), "auprc": self.auprc.rounded(), **rates}


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


def average_precision(scores: Float64, labels: Labels) -> float:
    """Sum over thresholds of the precision there times the recall gained there; see ``auroc`` for the arguments."""
    return float(_Ranked(scores, labels).figures(np.ones((1, labels.size)), ()).auprc[0])


def tpr_at_fpr(scores: Float64, labels: Labels, target: float = 0.01) -> float:
    """Share of positives above the lowest threshold that at most ``target`` of these negatives exceed."""
    return float(_Ranked(scores, labels).figures(np.ones((1, labels.size)), (target,)).tpr[0, 0])


def positive_value(tpr: float, fpr: float, prevalence: float) -> float:
    """Of all alarms, the share that is right when ``prevalence`` of the requests are positive."""
    right = tpr * prevalence
    wrong = fpr * (1.0 - prevalence)
    return right / (right + wrong) if right + wrong > 0 else 0.0


def measure(scores: Float64, labels: Labels, *, seed: int, groups: Sequence[Hashable] | None = None) -> Quality:
    """All figures of one scorer, with percentile intervals over 1,000 resamples of whole clusters.

    Args:
        scores: (n,), minus infinity allowed.
        labels: (n,), 0 or 1, both present.
        seed: of the resamples.
        groups: cluster of each row; None: every row is its own.
    Raises:
        MeasureError: a label is missing or a score is NaN.
    """
    return Measurer(labels, groups, seed=seed).quality(scores)


class Measurer:
    """Figures of several scorers on the same rows and the same resamples, so that their differences are paired.

    Args:
        labels: (n,), 0 or 1, both present.
        groups: cluster of each row; None: every row is its own.
        seed: of the resamples.
    Raises:
        MeasureError: a label is missing.
    """

    def __init__(self, labels: Labels, groups: Sequence[Hashable] | None, *, seed: int) -> None:
        positives = int(labels.sum())
        if not 0 < positives < labels.size:
            raise MeasureError(
                f"{positives} positive and {labels.size - positives} negative rows: both are needed to measure how "
                "well they are told apart. Add rows of the missing label."
            )
        self._labels = labels
        self._negatives = labels.size - positives
        self._counts = draw_clusters(labels, groups, seed=seed)

    def quality(self, scores: Float64) -> Quality:
        """Figures and intervals of (n,) scores.

        Raises:
            MeasureError: a score is NaN.
        """
        ranked = _Ranked(scores, self._labels)
        exact = ranked.figures(np.ones((1, scores.size)), FPR_TARGETS)
        drawn = [ranked.figures(counts, FPR_TARGETS) for counts in self._chunks()]
        rates = []
        for place, target in enumerate(FPR_TARGETS):
            needed = round(1 / target)
            if self._negatives < needed:
                reason = f"not certifiable: {self._negatives} negatives, at least {needed} are needed"
                rates.append(RateAt(target, None, reason))
                continue
            resampled = np.concatenate([part.tpr[place] for part in drawn])
            rates.append(RateAt(target, Estimate.of(float(exact.tpr[place, 0]), resampled)))
        return Quality(
            Estimate.of(auroc(scores, self._labels), np.concatenate([part.auroc for part in drawn])),
            Estimate.of(float(exact.auprc[0]), np.concatenate([part.auprc for part in drawn])),
            tuple(rates),
        )

    def areas(self, scores: Float64) -> Float64:
        """(resamples,), the AUROC in each: to be combined with those of other sets."""
        ranked = _Ranked(scores, self._labels)
        return np.concatenate([ranked.figures(counts, ()).auroc for counts in self._chunks()])

    def difference(self, scores: Float64, other: Float64) -> Estimate:
        """By how much the AUROC of ``scores`` exceeds that of ``other``, both (n,), on the same resamples."""
        value = auroc(scores, self._labels) - auroc(other, self._labels)
        return Estimate.of(value, self.areas(scores) - self.areas(other))

    def mean(self, values: Float64) -> Estimate:
        """The mean of (n,) values over rows."""
        parts = [counts @ values / counts.sum(axis=1) for counts in self._chunks()]
        return Estimate.of(float(values.mean()), np.concatenate(parts))

    def _chunks(self) -> Iterator[Float64]:
        step = max(1, _CHUNK // max(1, self._labels.size))
        for start in range(0, len(self._counts), step):
            yield self._counts[start : start + step].astype(np.float64)


@dataclass(frozen=True, slots=True)
class _Figures:
    """Of R weightings of the rows: auroc and auprc (R,), tpr (targets, R)."""

    auroc: Float64
    auprc: Float64
    tpr: Float64


class _Ranked:
    """Rows in falling order of their scores, equal scores together."""

    def __init__(self, scores: Float64, labels: Labels) -> None:
        if np.isnan(scores).any():
            raise MeasureError(
                f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN; none may be. "
                "A statistic that is not defined is minus infinity."
            )
        self._order = np.argsort(-scores, kind="stable")
        ranked = scores[self._order]
        self._starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
        self._positive = labels[self._order].astype(np.float64)

    def figures(self, counts: Float64, targets: Sequence[float]) -> _Figures:
        """Figures of (R, n) weightings."""
        weights = counts[:, self._order]
        positives = np.add.reduceat(weights * self._positive, self._starts, axis=1)
        negatives = np.add.reduceat(weights * (1.0 - self._positive), self._starts, axis=1)
        caught, alarms = np.cumsum(positives, axis=1), np.cumsum(negatives, axis=1)
        all_positives, all_negatives = caught[:, -1], alarms[:, -1]
        # A positive beats the negatives that come behind its ties, and half of its ties.
        beaten = all_negatives[:, None] - alarms + negatives / 2
        fired = caught + alarms
        precision = np.divide(caught, fired, out=np.zeros_like(caught), where=fired > 0)
        rates = np.empty((len(targets), len(counts)))
        for place, target in enumerate(targets):
            allowed = np.floor(target * all_negatives + _ROUNDING)
            at = np.argmax(alarms > allowed[:, None], axis=1)
            rows = np.arange(len(counts))
            rates[place] = (caught[rows, at] - positives[rows, at]) / all_positives
        return _Figures(
            (positives * beaten).sum(axis=1) / (all_positives * all_negatives),
            (positives * precision).sum(axis=1) / all_positives,
            rates,
        )
