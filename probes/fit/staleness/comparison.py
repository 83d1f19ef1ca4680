"""The same requests through two builds of a model: by how much a detector ranks, fires and scores differently.

Knows no model and no verdict.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import ndtri
from scipy.stats import rankdata

from probes.errors import TelltaleError
from probes.fit.evaluation.measure import Measurer, auroc
from probes.fit.evaluation.resampling import draw_clusters

__all__ = [
    "UNLABELLED",
    "Agreement",
    "Benign",
    "Bounds",
    "Comparison",
    "ComparisonError",
    "Pairs",
    "Positive",
    "Ranking",
    "compare",
]

UNLABELLED = -1
_RANK_VARIANCE = 1.06
"""Of Fisher's z of a rank correlation, times n - 3 (Fieller, Hartley and Pearson 1957)."""
_FEWEST_FOR_Z = 4

Float64 = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


class ComparisonError(TelltaleError, ValueError):
    """Two sets of statistics cannot be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """One statistic of each request on either build.

    Attributes:
        before: (n,) float64, on the recorded build; minus infinity where it is not defined.
        after: (n,) float64, on the new one.
        labels: (n,): 1, 0, or ``UNLABELLED``.
        groups: (n,): rows of one group are not independent of each other.
        fired_before: (n,): whether it lay above the threshold for such a request.
        fired_after: (n,), likewise on the new build.
    Raises:
        ComparisonError: the lengths differ, there is no row, or a statistic is NaN.
    """

    before: Float64
    after: Float64
    labels: Integers
    groups: Integers
    fired_before: Booleans
    fired_after: Booleans

    def __post_init__(self) -> None:
        flags = (self.fired_before, self.fired_after)
        sizes = {part.shape for part in (self.before, self.after, self.labels, self.groups, *flags)}
        if len(sizes) != 1 or self.before.ndim != 1 or self.before.size == 0:
            raise ComparisonError(
                f"statistics, labels and groups have the shapes {sorted(sizes)}: they must be those of the same "
                "requests, at least one. Record the reference again."
            )
        if np.isnan(self.before).any() or np.isnan(self.after).any():
            raise ComparisonError("a statistic is NaN; one that is not defined is minus infinity.")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Bounds(_Strict):
    """A figure with one-sided bounds, each at the confidence of the promise."""

    value: float
    low: float = Field(description="it is surely not less")
    high: float = Field(description="it is surely not more")


class Benign(_Strict):
    """Alarms on the rows with label 0."""

    num: int = Field(gt=0)
    groups: int = Field(gt=0)
    alarms_before: int = Field(ge=0)
    alarms_after: int = Field(ge=0)
    newly: int = Field(ge=0, description="groups with more alarms than before")
    no_longer: int = Field(ge=0, description="groups with fewer")


class Positive(_Strict):
    """Alarms on the rows with label 1."""

    num: int = Field(gt=0)
    groups: int = Field(gt=0)
    caught_before: int = Field(ge=0)
    caught_after: int = Field(ge=0)
    loss: Bounds = Field(description="of the true-positive rate at the threshold; negative: more are caught")


class Ranking(_Strict):
    """How well the labels are told apart."""

    auroc_before: float
    auroc_after: float
    loss: Bounds = Field(description="of AUROC, paired; negative: it ranks better")


class Agreement(_Strict):
    """How alike the statistics are, whatever the labels; of the rows where both are defined."""

    num: int = Field(ge=0)
    groups: int = Field(ge=0)
    identical: int = Field(ge=0, description="rows with the very same number")
    undefined_before: int = Field(ge=0, description="rows too short for the aggregate")
    undefined_after: int = Field(ge=0)
    rank_correlation: float | None = Field(description="Spearman's; None where the numbers do not vary")
    rank_correlation_low: float | None = Field(description="it is surely not less; None where the rows are too few")
    mean_shift: float | None = Field(description="in standard deviations of the recorded statistics")
    largest_shift: float | None = Field(description="likewise, without its sign")


class Comparison(_Strict):
    """All figures; a part is None where no row has its label."""

    num: int = Field(gt=0)
    benign: Benign | None
    positive: Positive | None
    ranking: Ranking | None
    agreement: Agreement


def compare(pairs: Pairs, *, confidence: float, seed: int) -> Comparison:
    """Compare two builds.

    Bounds of losses are percentiles of a paired bootstrap that draws whole groups.

    Args:
        pairs: statistics of the same requests.
        confidence: of each bound, one-sided.
        seed: of the bootstrap.
    """
    benign, positive = pairs.labels == 0, pairs.labels == 1
    return Comparison(
        num=pairs.before.size,
        benign=_benign(pairs) if benign.any() else None,
        positive=_positive(pairs, confidence, seed) if positive.any() else None,
        ranking=_ranking(pairs, confidence, seed) if benign.any() and positive.any() else None,
        agreement=_agreement(pairs, confidence),
    )


def _benign(pairs: Pairs) -> Benign:
    rows = pairs.labels == 0
    before, after = pairs.fired_before[rows], pairs.fired_after[rows]
    change = _by_group(after.astype(np.int64) - before.astype(np.int64), pairs.groups[rows])
    return Benign(
        num=int(rows.sum()),
        groups=change.size,
        alarms_before=int(before.sum()),
        alarms_after=int(after.sum()),
        newly=int(np.sum(change > 0)),
        no_longer=int(np.sum(change < 0)),
    )


def _positive(pairs: Pairs, confidence: float, seed: int) -> Positive:
    rows = pairs.labels == 1
    before, after = pairs.fired_before[rows], pairs.fired_after[rows]
    lost = before.astype(np.float64) - after.astype(np.float64)
    counts = draw_clusters(pairs.labels[rows], pairs.groups[rows].tolist(), seed=seed).astype(np.float64)
    return Positive(
        num=int(rows.sum()),
        groups=np.unique(pairs.groups[rows]).size,
        caught_before=int(before.sum()),
        caught_after=int(after.sum()),
        loss=_bounds(float(lost.mean()), counts @ lost / counts.sum(axis=1), confidence),
    )


def _ranking(pairs: Pairs, confidence: float, seed: int) -> Ranking:
    rows = pairs.labels != UNLABELLED
    labels, before, after = pairs.labels[rows], pairs.before[rows], pairs.after[rows]
    measurer = Measurer(labels, pairs.groups[rows].tolist(), seed=seed)
    was, is_now = auroc(before, labels), auroc(after, labels)
    drawn = measurer.areas(before) - measurer.areas(after)
    return Ranking(auroc_before=was, auroc_after=is_now, loss=_bounds(was - is_now, drawn, confidence))


def _agreement(pairs: Pairs, confidence: float) -> Agreement:
    defined = np.isfinite(pairs.before) & np.isfinite(pairs.after)
    before, after = pairs.before[defined], pairs.after[defined]
    groups = np.unique(pairs.groups[defined]).size
    correlation = _rank_correlation(before, after)
    low = None
    if correlation is not None and groups >= _FEWEST_FOR_Z:
        z = np.arctanh(min(correlation, 1 - 1e-12)) - ndtri(confidence) * np.sqrt(_RANK_VARIANCE / (groups - 3))
        low = float(np.tanh(z))
    spread = float(before.std()) if before.size else 0.0
    shift = (after - before) / spread if spread > 0 else None
    return Agreement(
        num=before.size,
        groups=groups,
        identical=int(np.sum(pairs.before == pairs.after)),
        undefined_before=int(np.sum(~np.isfinite(pairs.before))),
        undefined_after=int(np.sum(~np.isfinite(pairs.after))),
        rank_correlation=correlation,
        rank_correlation_low=low,
        mean_shift=None if shift is None else float(shift.mean()),
        largest_shift=None if shift is None else float(np.abs(shift).max()),
    )


def _rank_correlation(before: Float64, after: Float64) -> float | None:
    if before.size < _FEWEST_FOR_Z or np.ptp(before) == 0 or np.ptp(after) == 0:
        return None
    return float(np.corrcoef(rankdata(before), rankdata(after))[0, 1])


def _by_group(values: Integers, groups: Integers) -> Integers:
    """Sums of the values of each group."""
    _, places = np.unique(groups, return_inverse=True)
    return np.bincount(places, weights=values).astype(np.int64)


def _bounds(value: float, drawn: Float64, confidence: float) -> Bounds:
    low, high = np.quantile(drawn, (1.0 - confidence, confidence))
    return Bounds(value=value, low=float(low), high=float(high))
