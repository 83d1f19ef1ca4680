"""Thresholds by rate and confidence, against scipy's binomial distribution and the published table."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings
from scipy.stats import binom

from probes.threshold import allowed_exceedances, benign_needed, threshold_for

rates = st.floats(1e-4, 0.5)
confidences = st.floats(0.05, 0.999)


@pytest.mark.parametrize(
    ("num_benign", "target_fpr", "allowed"),
    [
        (298, 0.01, None),
        (299, 0.01, 0),
        (300, 0.01, 0),
        (500, 0.01, 1),
        (1000, 0.01, 4),
        (2000, 0.01, 12),
        (5000, 0.01, 38),
        (1000, 0.005, 1),
        (2000, 0.005, 4),
        (2994, 0.001, None),
        (2995, 0.001, 0),
        (5000, 0.001, 1),
    ],
)
def test_the_published_table(num_benign: int, target_fpr: float, allowed: int | None) -> None:
    assert allowed_exceedances(num_benign, target_fpr) == allowed


@settings(max_examples=200, deadline=None)
@given(num_benign=st.integers(1, 20_000), target_fpr=rates, confidence=confidences)
def test_allowed_is_the_largest_count_that_proves_it(num_benign: int, target_fpr: float, confidence: float) -> None:
    risk = 1.0 - confidence
    allowed = allowed_exceedances(num_benign, target_fpr, confidence=confidence)
    tails = binom.cdf(np.arange(num_benign + 1), num_benign, target_fpr)
    assume(np.abs(tails - risk).min() > 1e-9)  # on the edge itself, rounding decides
    proving = np.flatnonzero(tails <= risk)
    assert allowed == (int(proving[-1]) if len(proving) else None)


@settings(max_examples=100, deadline=None)
@given(target_fpr=rates, confidence=confidences)
def test_needed_is_the_fewest(target_fpr: float, confidence: float) -> None:
    needed = benign_needed(target_fpr, confidence=confidence)
    assert allowed_exceedances(needed, target_fpr, confidence=confidence) is not None
    assert allowed_exceedances(needed - 1, target_fpr, confidence=confidence) is None


def test_needed_for_the_usual_rates() -> None:
    assert [benign_needed(rate) for rate in (0.01, 0.005, 0.001)] == [299, 598, 2995]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_benign=st.integers(299, 3000))
def test_the_threshold_lets_no_more_through_than_allowed(seed: int, num_benign: int) -> None:
    scores = np.sort(np.random.default_rng(seed).standard_normal(num_benign))[::-1]
    allowed = allowed_exceedances(num_benign, 0.01)
    threshold = threshold_for(scores[:100].tolist(), num_benign, 0.01)
    assert threshold is not None
    assert np.count_nonzero(scores > threshold) == allowed
    # It is the lowest such: just below it, one more fires.
    assert np.count_nonzero(scores > np.nextafter(threshold, -np.inf)) == (allowed or 0) + 1


def test_the_promise_holds() -> None:
    """Over many calibrations, the true rate exceeds the target in at most one of twenty."""
    rng = np.random.default_rng(0)
    scores = np.sort(rng.random((2000, 500)), axis=1)[:, ::-1]
    thresholds = np.array([threshold_for(row[:20].tolist(), 500, 0.01) for row in scores], dtype=float)
    broken = np.mean(1.0 - thresholds > 0.01)  # scores are uniform: the true rate is known
    assert 0.02 < broken < 0.055


def test_too_few_scores_are_kept_or_too_few_requests_scored() -> None:
    assert threshold_for([3.0, 2.0, 1.0, 0.5], 1000, 0.01) is None
    assert threshold_for([3.0, 2.0, 1.0, 0.5, 0.25], 1000, 0.01) == 0.25
    assert threshold_for([3.0] * 298, 298, 0.01) is None


@pytest.mark.parametrize(("target_fpr", "confidence"), [(0.0, 0.95), (1.0, 0.95), (float("nan"), 0.95), (0.01, 1.0)])
def test_senseless_rates_are_refused(target_fpr: float, confidence: float) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        allowed_exceedances(1000, target_fpr, confidence=confidence)
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        benign_needed(target_fpr, confidence=confidence)
