"""Figures of a detector on one set of rows, each beside those of scorers that do not look inside the model.

Arrays in, a report out: it runs no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, rankdata
from sklearn.metrics import roc_curve

from probes.card import Calibration, Platt
from probes.fit.calibration.platt import Sigmoid
from probes.fit.evaluation.baselines import labels_of, length_score, question_mark_score
from probes.fit.evaluation.controls import Control
from probes.fit.evaluation.evaluation import (
    DETECTOR,
    Absent,
    Band,
    BaseRate,
    Bin,
    Curve,
    Histogram,
    ReliabilityReport,
    Row,
    Share,
    SliceReport,
    Table,
    ThresholdReport,
)
from probes.fit.evaluation.measure import Estimate, Measurer, Quality, auroc, positive_value
from probes.fit.evaluation.reliability import reliability
from probes.fit.rows.example import Example
from probes.fit.rows.slices import slices
from probes.fit.training.linear_probe import Labels

__all__ = [
    "ScoredRows",
    "at_threshold",
    "base_rates",
    "compare",
    "histogram",
    "labels_of",
    "limits_of",
    "report_reliability",
    "report_slices",
    "report_threshold",
    "trivial_in",
]

Float64 = npt.NDArray[np.float64]

PREVALENCES = (0.01, 0.001, 0.0001)
_BAND = (2.5, 97.5)
_CHANCE = 0.5
_CURVE_POINTS = 120
_HISTOGRAM_BINS = 30
_FEWEST = 10
"""Rows of a label below which a part of a set has no AUROC of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRows:
    """Rows with the statistics of the detector and of what stands beside it.

    Attributes:
        examples: both labels.
        scores: (n,), the detector's.
        peers: (n,) of each scorer that was trained on the detector's training rows.
        bands: for each control that is drawn many times, (n,) of each draw.
        absent: controls that were not measured, and why.
    """

    examples: Sequence[Example]
    scores: Float64
    peers: Mapping[Control, Float64] = field(default_factory=dict)
    bands: Mapping[Control, Sequence[Float64]] = field(default_factory=dict)
    absent: Sequence[Absent] = ()


def compare(tested: ScoredRows, *, seed: int) -> Table:
    """All figures of the detector and of every control, on the same resamples of whole groups.

    Length and question mark are reported in the direction that suits them better on these very rows.

    Raises:
        probes.fit.evaluation.measure.MeasureError: a label is missing or a score is NaN.
    """
    labels = labels_of(tested.examples)
    groups = [example.group for example in tested.examples]
    measurer = Measurer(labels, groups, seed=seed)
    scores = {**tested.peers, **_trivial(tested.examples)}

    def row(name: str, found: Float64, difference: Estimate | None) -> Row:
        quality: Quality = measurer.quality(found)
        return Row(
            name=name,
            auroc=quality.auroc,
            auprc=quality.auprc,
            tpr=quality.tpr,
            difference=difference,
            curve=_curve(found, labels),
        )

    return Table(
        num_positive=int(labels.sum()),
        num_negative=int(labels.size - labels.sum()),
        num_groups=len(set(groups)),
        detector=row(DETECTOR, tested.scores, None),
        controls=tuple(
            row(control.value, found, measurer.difference(tested.scores, found)) for control, found in scores.items()
        ),
        bands=tuple(_band(control, draws, labels) for control, draws in tested.bands.items() if len(draws)),
        absent=tuple(tested.absent),
    )


def trivial_in(examples: Sequence[Example]) -> dict[Control, float]:
    """AUROC of length and of question mark, each in the direction that suits it better."""
    labels = labels_of(examples)
    return {control: auroc(scores, labels) for control, scores in _trivial(examples).items()}


def limits_of(calibration: Calibration, lengths: Sequence[int] | npt.NDArray[np.int64]) -> Float64:
    """(n,) the calibrated threshold for requests of these lengths, in tokens that are read."""
    if not calibration.buckets:
        return np.full(len(lengths), calibration.threshold)
    ends = [bucket.max_tokens for bucket in calibration.buckets if bucket.max_tokens is not None]
    values = np.array([bucket.threshold for bucket in calibration.buckets])
    limits: Float64 = values[np.searchsorted(ends, lengths)]
    return limits


def report_threshold(
    calibration: Calibration, scores: Float64, labels: Labels, lengths: Sequence[int]
) -> ThresholdReport:
    """What the calibrated threshold does on rows of both labels.

    Args:
        calibration: with one threshold, or with several by length.
        scores: (n,).
        labels: (n,).
        lengths: tokens of each row that are read.
    """
    fired = scores > limits_of(calibration, lengths)
    certified = (
        all(bucket.certified for bucket in calibration.buckets) if calibration.buckets else calibration.certified
    )
    caught = _share(fired[labels == 1])
    return ThresholdReport(
        threshold=calibration.threshold,
        by_length=bool(calibration.buckets),
        target_fpr=calibration.target_fpr,
        certified=certified,
        num_benign=calibration.num_benign,
        caught=caught,
        false_alarms=_share(fired[labels == 0]),
        base_rates=base_rates(caught.count / caught.of, calibration.target_fpr),
    )


def base_rates(tpr: float, fpr: float) -> tuple[BaseRate, ...]:
    """What alarms are worth at each of ``PREVALENCES``: the share that is right, and how many there are of 10,000."""
    return tuple(
        BaseRate(
            prevalence=share,
            positive_value=positive_value(tpr, fpr, share),
            alarms=10_000 * (tpr * share + fpr * (1.0 - share)),
        )
        for share in PREVALENCES
    )


def report_slices(tested: ScoredRows, lengths: Sequence[int], *, limits: Float64, seed: int) -> tuple[SliceReport, ...]:
    """Figures by source, role, language and length; see ``SliceReport`` for slices with one label alone.

    Args:
        tested: rows and scores.
        lengths: tokens of each row that are read.
        limits: (n,) threshold for each row.
        seed: of the resamples.
    """
    labels = labels_of(tested.examples)
    groups = [example.group for example in tested.examples]
    found = []
    for part in slices(tested.examples, lengths):
        own = labels[part.rows]
        rows = part.rows
        if own.min() == own.max():
            rows = np.sort(np.concatenate([rows, np.flatnonzero(labels != own[0])]))
        estimate = None
        if min((own == label).sum() for label in set(own.tolist())) >= _FEWEST:
            measurer = Measurer(labels[rows], [groups[i] for i in rows], seed=seed)
            area = auroc(tested.scores[rows], labels[rows])
            estimate = Estimate.of(area, measurer.areas(tested.scores[rows]))
        fired = tested.scores[part.rows] > limits[part.rows]
        found.append(
            SliceReport(
                key=part.key,
                value=part.value,
                num_positive=int(own.sum()),
                num_negative=int(own.size - own.sum()),
                auroc=estimate,
                caught=_share(fired[own == 1]) if (own == 1).any() else None,
                false_alarms=_share(fired[own == 0]) if (own == 0).any() else None,
            )
        )
    return tuple(found)


def histogram(scores: Float64, labels: Labels) -> Histogram:
    """Counts by label in 30 bins of equal width over the finite scores."""
    finite = scores[np.isfinite(scores)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    edges = np.linspace(low, high if high > low else low + 1.0, _HISTOGRAM_BINS + 1)
    counts = [np.histogram(np.maximum(scores[labels == label], edges[0]), edges)[0] for label in (1, 0)]
    return Histogram(
        edges=tuple(edges.tolist()), positives=tuple(counts[0].tolist()), negatives=tuple(counts[1].tolist())
    )


def report_reliability(platt: Platt, scores: Float64, examples: Sequence[Example], *, seed: int) -> ReliabilityReport:
    """Whether the card's probabilities hold on other rows; their share of positives counts.

    Args:
        platt: from the statistic to a probability.
        scores: (n,), the detector's.
        examples: the n rows, both labels.
        seed: of the resamples.
    """
    labels = labels_of(examples)
    said = Sigmoid(platt.slope, platt.intercept).probability(scores)
    found = reliability(said, labels)
    measurer = Measurer(labels, [example.group for example in examples], seed=seed)
    bins = zip(found.mean_probability, found.share_positive, found.rows, strict=True)
    return ReliabilityReport(
        error=found.error,
        brier=measurer.mean((said - labels) ** 2),
        bins=tuple(Bin(mean_probability=mean, share_positive=share, rows=rows) for mean, share, rows in bins),
    )


def at_threshold(calibration: Calibration, sets: Mapping[str, tuple[Float64, Float64, Labels]]) -> dict[str, Any]:
    """What the threshold does on each set: how many rows of how many fire, by label, and what an alarm is worth.

    Args:
        calibration: with one threshold, or with several by length.
        sets: by name, scores, limits (see ``limits_of``) and labels of the rows, (n,) each.
    """
    report: dict[str, Any] = {"threshold": round(calibration.threshold, 4), "target_fpr": calibration.target_fpr}
    if calibration.buckets:
        report["by_length"] = True
    for name, (scores, limits, labels) in sets.items():
        fired = scores > limits
        counts = {}
        for label, word in ((1, "positive"), (0, "negative")):
            rows = labels == label
            if rows.any():
                counts[f"fired_{word}"] = [int(fired[rows].sum()), int(rows.sum())]
        report[name] = counts
        if (labels == 1).any():
            panel = base_rates(float(fired[labels == 1].mean()), calibration.target_fpr)
            report[name]["precision_at_prevalence"] = {
                f"{rate.prevalence:g}": round(rate.positive_value, 4) for rate in panel
            }
    return report


def _trivial(examples: Sequence[Example]) -> dict[Control, Float64]:
    labels = labels_of(examples)
    texts = [example.judged for example in examples]
    scores = {
        Control.LENGTH_ONLY: length_score(texts),
        Control.QUESTION_MARK_ONLY: question_mark_score(texts),
    }
    return {control: found if auroc(found, labels) >= _CHANCE else -found for control, found in scores.items()}


def _band(control: Control, draws: Sequence[Float64], labels: Labels) -> Band:
    found = np.array([auroc(scores, labels) for scores in draws])
    low, high = np.percentile(found, _BAND)
    return Band(name=control, draws=len(draws), median=float(np.median(found)), low=float(low), high=float(high))


def _curve(scores: Float64, labels: Labels) -> Curve:
    """The ROC curve at points that are even on a linear or on a logarithmic axis; ranks, since a score may be -inf."""
    fpr, tpr, _ = roc_curve(labels, rankdata(scores, method="dense"))
    wanted = np.concatenate([np.linspace(0, 1, _CURVE_POINTS), np.geomspace(1e-4, 1, _CURVE_POINTS)])
    # The last point at each wanted rate: the highest TPR that is reached there.
    chosen = np.unique(np.concatenate([[0, fpr.size - 1], np.searchsorted(fpr, wanted, side="right") - 1]))
    return Curve(fpr=tuple(fpr[chosen].tolist()), tpr=tuple(tpr[chosen].tolist()))


def _share(fired: npt.NDArray[np.bool_]) -> Share:
    interval = binomtest(int(fired.sum()), fired.size).proportion_ci(0.95, method="exact")
    return Share(count=int(fired.sum()), of=fired.size, low=float(interval.low), high=float(interval.high))
