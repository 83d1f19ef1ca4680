"""The statistics of the benchmark: what is known exactly, what must not matter, and how often the interval covers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.bench.statistics import PairedRatio, paired_ratio

POSITIVE = st.floats(min_value=0.01, max_value=1000.0)
PAIRS = st.lists(st.tuples(POSITIVE, POSITIVE), min_size=2, max_size=12)


def ratio_of(pairs: list[tuple[float, float]]) -> PairedRatio:
    return paired_ratio([top for top, _ in pairs], [bottom for _, bottom in pairs], resamples=500)


def test_a_constant_ratio_has_an_interval_without_width() -> None:
    bottom = [100.0, 150.0, 90.0, 120.0]
    found = paired_ratio([0.97 * value for value in bottom], bottom)
    for estimate in (found.geometric_mean, found.median):
        assert (estimate.point, estimate.low, estimate.high) == pytest.approx((0.97, 0.97, 0.97))
    assert found.ratios == pytest.approx((0.97,) * 4)


def test_points_are_geometric_mean_and_median_of_the_ratios() -> None:
    found = paired_ratio([2.0, 8.0, 1.0], [1.0, 1.0, 1.0])
    assert found.geometric_mean.point == pytest.approx(16 ** (1 / 3))
    assert found.median.point == pytest.approx(2.0)


def test_the_median_ignores_one_disturbed_pair() -> None:
    plain = [100.0] * 15
    telltale = [99.0] * 14 + [50.0]
    found = paired_ratio(telltale, plain)
    assert found.median.point == pytest.approx(0.99)
    assert found.median.low == pytest.approx(0.99)
    assert found.geometric_mean.point < 0.96


def test_what_disturbs_both_of_a_pair_cancels() -> None:
    rng = np.random.default_rng(0)
    machine = np.exp(rng.normal(0.0, 0.5, 15))
    plain = 100.0 * machine
    telltale = 98.0 * machine * np.exp(rng.normal(0.0, 0.002, 15))
    found = paired_ratio(telltale.tolist(), plain.tolist())
    assert found.geometric_mean.point == pytest.approx(0.98, abs=0.003)
    assert found.geometric_mean.high - found.geometric_mean.low < 0.006


def test_the_same_input_gives_the_same_interval_and_the_seed_matters() -> None:
    top, bottom = [1.0, 1.1, 0.9, 1.3, 0.8], [1.0, 1.0, 1.0, 1.1, 1.0]
    assert paired_ratio(top, bottom) == paired_ratio(top, bottom)
    assert paired_ratio(top, bottom, resamples=50) != paired_ratio(top, bottom, resamples=50, seed=1)


@given(PAIRS)
@settings(max_examples=50)
def test_intervals_are_ordered_and_lie_within_the_ratios(pairs: list[tuple[float, float]]) -> None:
    found = ratio_of(pairs)
    lowest, highest = min(found.ratios) * (1 - 1e-9), max(found.ratios) * (1 + 1e-9)
    for estimate in (found.geometric_mean, found.median):
        assert lowest <= estimate.low <= estimate.high <= highest
        assert lowest <= estimate.point <= highest


@given(PAIRS)
@settings(max_examples=50)
def test_swapping_the_series_inverts_point_and_interval(pairs: list[tuple[float, float]]) -> None:
    found, swapped = ratio_of(pairs), ratio_of([(bottom, top) for top, bottom in pairs])
    for one, other in ((found.geometric_mean, swapped.geometric_mean), (found.median, swapped.median)):
        assert one.point == pytest.approx(1 / other.point)
        assert (one.low, one.high) == pytest.approx((1 / other.high, 1 / other.low))


@given(PAIRS, POSITIVE)
@settings(max_examples=50)
def test_units_do_not_matter(pairs: list[tuple[float, float]], factor: float) -> None:
    found, scaled = ratio_of(pairs), ratio_of([(top * factor, bottom * factor) for top, bottom in pairs])
    assert scaled.geometric_mean.low == pytest.approx(found.geometric_mean.low)
    assert scaled.median.point == pytest.approx(found.median.point)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    experiments, covered = 400, 0
    for _ in range(experiments):
        ratios = 0.98 * np.exp(rng.normal(0.0, 0.02, 15))
        found = paired_ratio(ratios.tolist(), [1.0] * 15, resamples=1000).geometric_mean
        covered += found.low <= 0.98 <= found.high
    # A percentile interval over 15 rounds is a little narrow: 92 to 93 of 100 in place of 95.
    assert 0.89 <= covered / experiments <= 0.97


def test_more_confidence_is_a_wider_interval() -> None:
    rng = np.random.default_rng(2)
    ratios = np.exp(rng.normal(0.0, 0.05, 15)).tolist()
    narrow = paired_ratio(ratios, [1.0] * 15, confidence=0.5).geometric_mean
    wide = paired_ratio(ratios, [1.0] * 15, confidence=0.99).geometric_mean
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("top", "bottom", "said"),
    [
        ([1.0, 2.0], [1.0], "2 values over 1"),
        ([1.0], [1.0], "at least 2"),
        ([1.0, 0.0], [1.0, 1.0], "numerator"),
        ([1.0, 1.0], [1.0, -2.0], "denominator"),
        ([1.0, math.nan], [1.0, 1.0], "numerator"),
        ([1.0, 1.0], [math.inf, 1.0], "denominator"),
    ],
)
def test_what_is_no_series_of_pairs_is_refused(top: list[float], bottom: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        paired_ratio(top, bottom)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_a_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(ValueError, match=r"0\.95"):
        paired_ratio([1.0, 1.0], [1.0, 1.0], confidence=confidence)
