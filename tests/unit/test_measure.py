"""Figures against sklearn's, intervals against what is known of them, delays and base rates against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score, roc_curve

from probes.card import LengthBucket
from probes.fit.calibration.platt import Sigmoid
from probes.fit.evaluation.delay import detection_delay, first_crossing
from probes.fit.evaluation.evaluate import ScoredRows, base_rates, compare, histogram, limits_of, report_threshold
from probes.fit.evaluation.measure import (
    FPR_TARGETS,
    Estimate,
    MeasureError,
    Measurer,
    auroc,
    average_precision,
    measure,
    tpr_at_fpr,
)
from probes.fit.evaluation.reliability import reliability
from probes.fit.evaluation.resampling import draw_clusters
from probes.fit.rows.example import Example
from tests.unit.artifacts import calibration


def scored(count: int, seed: int, *, gap: float = 1.0, levels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels; with few levels there are many ties."""
    generator = np.random.default_rng(seed)
    labels = (np.arange(count) % 3 == 0).astype(np.int64)
    scores = generator.standard_normal(count) + gap * labels
    return (scores if levels is None else np.round(scores * levels) / levels), labels


@given(count=st.integers(6, 200), seed=st.integers(0, 1000), levels=st.sampled_from([None, 1, 3]))
@settings(max_examples=60, deadline=None)
def test_areas_are_those_of_sklearn(count: int, seed: int, levels: int | None) -> None:
    scores, labels = scored(count, seed, levels=levels)
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    for target in FPR_TARGETS:
        assert tpr_at_fpr(scores, labels, target) == pytest.approx(tpr[fpr <= target].max(), abs=1e-12)


@given(seed=st.integers(0, 200), bins=st.sampled_from([5, 15]))
@settings(max_examples=30, deadline=None)
def test_reliability_is_that_of_sklearn(seed: int, bins: int) -> None:
    scores, labels = scored(400, seed)
    said = Sigmoid(1.3, -0.7).probability(scores)
    found = reliability(said, labels, bins=bins)
    true, mean = calibration_curve(labels, said, n_bins=bins, strategy="quantile")
    assert found.share_positive == pytest.approx(true)
    assert found.mean_probability == pytest.approx(mean)
    assert found.brier == pytest.approx(brier_score_loss(labels, said))
    assert found.rows.sum() == 400
    assert 0 <= found.error <= 1


def test_the_calibration_error_is_what_was_put_in() -> None:
    generator = np.random.default_rng(0)
    honest = generator.random(40_000)
    labels = (generator.random(40_000) < honest).astype(np.int64)
    assert reliability(honest, labels).error < 0.02
    # Said too high by 0.1 everywhere.
    assert reliability(
        np.minimum(honest * 0.9 + 0.1, 1.0), (generator.random(40_000) < honest * 0.9).astype(int)
    ).error == (pytest.approx(0.1, abs=0.01))


def test_an_own_cluster_for_each_row_is_the_plain_bootstrap() -> None:
    scores, labels = scored(240, 1)
    plain, singles = measure(scores, labels, seed=5), measure(scores, labels, seed=5, groups=list(range(240)))
    assert plain == singles
    # And the plain one is the textbook's: rows of each label drawn with replacement.
    generator = np.random.default_rng(0)
    positives, negatives = scores[labels == 1], scores[labels == 0]
    drawn = []
    for _ in range(1000):
        high, low = generator.choice(positives, positives.size), generator.choice(negatives, negatives.size)
        drawn.append(roc_auc_score(np.repeat([1, 0], [high.size, low.size]), np.concatenate([high, low])))
    assert [plain.auroc.low, plain.auroc.high] == pytest.approx(np.percentile(drawn, (2.5, 97.5)), abs=0.012)


def test_copies_of_rows_narrow_the_plain_interval_and_not_the_clustered_one() -> None:
    scores, labels = scored(120, 2)
    once = measure(scores, labels, seed=0).auroc
    copies, groups = 8, np.repeat(np.arange(120), 8)
    scores, labels = np.repeat(scores, copies), np.repeat(labels, copies)
    plain = measure(scores, labels, seed=0).auroc
    clustered = measure(scores, labels, seed=0, groups=groups.tolist()).auroc
    assert clustered.value == pytest.approx(once.value)
    assert clustered.high - clustered.low == pytest.approx(once.high - once.low, rel=0.15)
    assert plain.high - plain.low < 0.5 * (clustered.high - clustered.low)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Rows of a cluster resemble each other: whole clusters must be drawn for 95 % to mean 95 %."""
    gap, common, runs, size = 1.0, 1.0, 80, 6
    truth = float(norm.cdf(gap / np.sqrt(2 * (1 + common**2))))
    generator = np.random.default_rng(4)
    groups = np.repeat(np.arange(60), size)
    labels = (groups % 2).astype(np.int64)
    held = {"clustered": 0, "plain": 0}
    for run in range(runs):
        shared = common * generator.standard_normal(60)[groups]
        scores = gap * labels + shared + generator.standard_normal(labels.size)
        for name, clusters in (("clustered", groups.tolist()), ("plain", None)):
            found = Measurer(labels, clusters, seed=run)
            estimate = Estimate.of(auroc(scores, labels), found.areas(scores))
            held[name] += estimate.low <= truth <= estimate.high
    # Binomial(80, 0.95) lies above 68 but for one time in a thousand; a percentile interval is a little short.
    assert held["clustered"] >= 68
    assert held["plain"] < 0.8 * runs


def test_clusters_are_drawn_whole_and_every_resample_holds_both_labels() -> None:
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 0], dtype=np.int64)
    groups = ["a", "a", "b", "b", "c", "d", "d", "e", "pair", "pair"]
    counts = draw_clusters(labels, groups, seed=0).astype(int)
    assert counts.shape == (1000, 10)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert (counts[:, 5] == counts[:, 6]).all()
    assert (counts[:, :4].sum(axis=1) == 4).all()
    assert (counts[:, labels == 1].sum(axis=1) > 0).all()
    assert (counts[:, labels == 0].sum(axis=1) > 0).all()
    assert counts[:, 0].std() > 0
    # All positives of one cluster: its rows are drawn, or nothing would vary.
    alone = draw_clusters(labels[:8], ["p"] * 4 + list("cdef"), seed=0).astype(int)
    assert alone[:, 0].std() > 0
    assert (alone[:, :4].sum(axis=1) == 4).all()


def test_a_difference_is_paired() -> None:
    scores, labels = scored(600, 3)
    noisy = scores + 0.05 * np.random.default_rng(9).standard_normal(600)
    measurer = Measurer(labels, None, seed=0)
    alone, other = measurer.quality(scores).auroc, measurer.quality(noisy).auroc
    found = measurer.difference(scores, noisy)
    assert found.value == pytest.approx(alone.value - other.value)
    # Rows that both see cancel out.
    assert found.high - found.low < 0.2 * (alone.high - alone.low)
    same = measurer.difference(scores, scores)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("negatives", "told"), [(19, 0), (20, 1), (99, 1), (100, 2), (999, 2), (1000, 3)])
def test_a_rate_needs_as_many_negatives_as_it_speaks_of(negatives: int, told: int) -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([1, 0], [30, negatives]).astype(np.int64)
    found = measure(generator.standard_normal(labels.size), labels, seed=0)
    assert [rate.target_fpr for rate in found.tpr if rate.tpr is not None] == list(FPR_TARGETS)[:told]
    for rate in found.tpr[told:]:
        assert f"{negatives} negatives, at least {round(1 / rate.target_fpr)} are needed" in rate.reason
    assert [value is None for key, value in found.report().items() if key.startswith("tpr")] == [
        rate.tpr is None for rate in found.tpr
    ]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(MeasureError, match="3 positive and 0 negative"):
        measure(np.zeros(3), np.ones(3, dtype=np.int64), seed=0)
    with pytest.raises(MeasureError, match="1 of 4 scores are NaN"):
        measure(np.array([0.0, 1.0, np.nan, 2.0]), np.array([0, 1, 0, 1]), seed=0)


def test_statistics_that_are_never_defined_rank_lowest() -> None:
    scores = np.array([-np.inf, -np.inf, 0.0, 1.0, 2.0, 3.0])
    labels = np.array([0, 1, 0, 1, 0, 1], dtype=np.int64)
    finite = np.where(np.isfinite(scores), scores, -99.0)
    assert measure(scores, labels, seed=0) == measure(finite, labels, seed=0)
    counts = histogram(scores, labels)
    assert sum(counts.positives) == sum(counts.negatives) == 3
    assert np.isfinite(counts.edges).all()
    rows = [Example(text="a" * i, label=int(label), source="s", group=str(i)) for i, label in enumerate(labels)]
    assert compare(ScoredRows(examples=rows, scores=scores), seed=0).detector.curve.tpr[-1] == 1.0


def test_delays_of_planted_series() -> None:
    quiet, loud = np.zeros(12), np.full(12, 5.0)
    at_7 = np.concatenate([np.zeros(7), np.ones(5)])
    assert first_crossing(quiet, 0.5) is None
    assert first_crossing(loud, 0.5) == 0
    assert first_crossing(at_7, 0.5) == 7
    assert first_crossing(at_7, 1.0) is None, "a statistic fires above its threshold, strictly"
    assert first_crossing(np.empty(0), 0.0) is None
    found = detection_delay([0, 7, None, 7, 3], [0, 0, 0, 5, 9])
    assert (found.requests, found.detected, found.early) == (5, 3, 1)
    assert (found.median, found.mean) == (2.0, 3.0)
    assert found.late == pytest.approx(np.percentile([0, 7, 2], 90))
    nothing = detection_delay([None, None], [0, 3])
    assert (nothing.detected, nothing.median) == (0, None)


def test_thresholds_by_length_are_used_where_the_card_has_them() -> None:
    one = calibration(threshold=2.0)
    assert limits_of(one, [1, 100]).tolist() == [2.0, 2.0]
    buckets = tuple(
        LengthBucket(max_tokens=end, threshold=value, num_benign=400, certified=certified, top_scores=(9.0,))
        for end, value, certified in ((10, 1.0, True), (20, 3.0, True), (None, 5.0, False))
    )
    several = one.model_copy(update={"buckets": buckets})
    assert limits_of(several, [1, 10, 11, 20, 21, 900]).tolist() == [1.0, 1.0, 3.0, 3.0, 5.0, 5.0]
    scores, labels = np.array([2.0, 2.0, 6.0, 4.0]), np.array([1, 1, 0, 0], dtype=np.int64)
    found = report_threshold(several, scores, labels, [10, 11, 30, 30])
    assert (found.caught.count, found.false_alarms.count) == (1, 1)
    assert found.by_length
    assert not found.certified, "one bucket is not"
    # Clopper and Pearson: 1 of 2 lies anywhere between 1.3 % and 98.7 %.
    assert (found.caught.low, found.caught.high) == pytest.approx((0.0126, 0.9874), abs=1e-4)


def test_base_rates_are_the_closed_form() -> None:
    # methods: at TPR 90 %, prevalence 1e-3 and FPR 1 % a share of 8.3 % of 109 alerts in 10,000 is right.
    panel = {rate.prevalence: rate for rate in base_rates(0.9, 0.01)}
    assert set(panel) == {0.01, 0.001, 0.0001}
    for share, rate in panel.items():
        assert rate.positive_value == pytest.approx(0.9 * share / (0.9 * share + 0.01 * (1 - share)))
        assert rate.alarms == pytest.approx(10_000 * (0.9 * share + 0.01 * (1 - share)))
    assert panel[0.001].positive_value == pytest.approx(0.083, abs=5e-4)
    assert round(panel[0.001].alarms) == 109
    assert base_rates(0.0, 0.0)[0].positive_value == 0.0
