"""What a threshold promises, held against thousands of calibrations whose true rates are known."""

from __future__ import annotations

from collections.abc import Callable

import crepes
import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from scipy.stats import beta, binom, poisson

from probes.aggregate.max import Max
from probes.card import Calibration, Format, Stage
from probes.fit.calibration.calibrate import CalibrationError, Promise, bound_of, calibrate, shares, shortfall
from probes.fit.rows.example import Example
from probes.threshold import (
    ThresholdMethod,
    benign_needed,
    conformal_exceedances,
    conformal_needed,
    exceedances,
    rate_bound,
    threshold_for,
)

Float64 = npt.NDArray[np.float64]
RESAMPLES = 2000
RISK = 0.05
MONTE_CARLO = 3 * np.sqrt(RISK * (1 - RISK) / RESAMPLES)


def uniform(rng: np.random.Generator, size: tuple[int, int]) -> Float64:
    return rng.random(size)


def counts(rng: np.random.Generator, size: tuple[int, int]) -> Float64:
    """Discrete: nearly every threshold is tied with many statistics."""
    return rng.poisson(3.0, size).astype(float)


def half_undefined(rng: np.random.Generator, size: tuple[int, int]) -> Float64:
    found = rng.random(size)
    return np.where(rng.random(size) < 0.5, -np.inf, found)


POPULATIONS: dict[str, tuple[Callable[[np.random.Generator, tuple[int, int]], Float64], Callable[[Float64], Float64]]]
POPULATIONS = {
    "continuous": (uniform, lambda t: 1 - t),
    "discrete": (counts, lambda t: poisson.sf(t, 3.0)),
    "half undefined": (half_undefined, lambda t: (1 - t) / 2),
}


def true_rates(name: str, num_benign: int, target: float, method: ThresholdMethod) -> Float64:
    """The true false-positive rate of the threshold of each of many calibrations."""
    draw, rate = POPULATIONS[name]
    samples = draw(np.random.default_rng(11), (RESAMPLES, num_benign))
    kept = (exceedances(num_benign, target, method=method) or 0) + 1
    tops = np.sort(samples, axis=1)[:, ::-1][:, :kept]
    found = [threshold_for(row.tolist(), num_benign, target, method=method) for row in tops]
    assert None not in found
    return rate(np.array(found, dtype=float))


@pytest.mark.parametrize("name", POPULATIONS)
@pytest.mark.parametrize(("num_benign", "target"), [(299, 0.01), (1000, 0.01), (700, 0.005)])
def test_pac_is_wrong_as_seldom_as_it_says(name: str, num_benign: int, target: float) -> None:
    rates = true_rates(name, num_benign, target, ThresholdMethod.PAC)
    assert np.mean(rates > target) <= RISK + MONTE_CARLO


@pytest.mark.parametrize("name", POPULATIONS)
@pytest.mark.parametrize(("num_benign", "target"), [(99, 0.01), (1000, 0.01), (250, 0.02)])
def test_conformal_is_right_in_the_mean(name: str, num_benign: int, target: float) -> None:
    rates = true_rates(name, num_benign, target, ThresholdMethod.CONFORMAL)
    error = 3 * rates.std() / np.sqrt(RESAMPLES)
    assert rates.mean() <= target + error
    if name == "continuous":  # and no stricter than it has to be
        assert rates.mean() >= target - 1 / (num_benign + 1) - error


def test_conformal_says_nothing_of_one_calibration() -> None:
    """Why it certifies nothing: with as few requests as it can do with, a third of the calibrations break the rate."""
    rates = true_rates("continuous", 99, 0.01, ThresholdMethod.CONFORMAL)
    assert np.mean(rates > 0.01) > 0.3


@settings(max_examples=200, deadline=None)
@given(num_benign=st.integers(1, 5000), target=st.floats(1e-3, 0.4))
def test_the_conformal_rank(num_benign: int, target: float) -> None:
    """The largest count that keeps (count + 1) / (n + 1), the mean rate, at the target or below."""
    found = conformal_exceedances(num_benign, target)
    assert (found is None) == (num_benign < conformal_needed(target))
    if found is not None:
        assert (found + 1) / (num_benign + 1) <= target * (1 + 1e-12)
        assert (found + 2) / (num_benign + 1) > target * (1 - 1e-12)


@pytest.mark.parametrize(("target", "needed"), [(0.01, 99), (0.001, 999), (0.05, 19), (0.07, 14)])
def test_conformal_needs_fewer(target: float, needed: int) -> None:
    assert conformal_needed(target) == needed
    assert conformal_exceedances(needed, target) == 0
    assert conformal_exceedances(needed - 1, target) is None


@settings(max_examples=200, deadline=None)
@given(above=st.integers(0, 60), extra=st.integers(1, 3000), confidence=st.floats(0.5, 0.999))
def test_the_bound_is_that_of_clopper_and_pearson(above: int, extra: int, confidence: float) -> None:
    num_benign = above + extra
    bound = rate_bound(above, num_benign, confidence=confidence)
    assert bound == pytest.approx(beta.ppf(confidence, above + 1, num_benign - above), rel=1e-9)
    assert binom.cdf(above, num_benign, bound) == pytest.approx(1 - confidence, rel=1e-6)


@pytest.mark.parametrize(("num_benign", "percent"), [(100, 4.7), (500, 2.1), (1000, 1.7), (5000, 1.3)])
def test_what_one_percent_observed_proves(num_benign: int, percent: float) -> None:
    assert round(100 * rate_bound(num_benign // 100, num_benign), 1) == percent
    assert rate_bound(num_benign, num_benign) == 1.0


def test_the_threshold_is_that_of_crepes() -> None:
    """A request fires exactly if crepes gives it a p-value of at most the target."""
    rng = np.random.default_rng(5)
    for num_benign, target in ((99, 0.01), (500, 0.01), (731, 0.05)):
        benign, new = rng.standard_normal(num_benign), rng.standard_normal(4000) + 1
        classifier = crepes.ConformalClassifier().fit(benign)
        p_values = np.ravel(classifier.predict_p(new[:, None], smoothing=False))
        threshold = threshold_for(np.sort(benign)[::-1].tolist(), num_benign, target, method=ThresholdMethod.CONFORMAL)
        assert threshold is not None
        assert np.array_equal(new > threshold, p_values <= target)


# --- several detectors ----------------------------------------------------------------------------------------------


def independent(rng: np.random.Generator, shape: tuple[int, int, int]) -> Float64:
    return rng.random(shape)


def the_same(rng: np.random.Generator, shape: tuple[int, int, int]) -> Float64:
    return np.broadcast_to(rng.random((1, *shape[1:])), shape)


def disjoint(rng: np.random.Generator, shape: tuple[int, int, int]) -> Float64:
    """The worst case: no two detectors ever fire on one request."""
    places = np.arange(shape[0])[:, None, None] / shape[0]
    return 1 - (rng.random((1, *shape[1:])) - places) % 1


@pytest.mark.parametrize(
    ("draw", "any_fires"),
    [
        (independent, lambda rates: 1 - np.prod(1 - rates, axis=0)),
        (the_same, lambda rates: rates.max(axis=0)),
        (disjoint, lambda rates: rates.sum(axis=0)),
    ],
    ids=["independent", "the same", "disjoint"],
)
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [6.0, 2.0, 1.0, 1.0]])
def test_several_detectors_keep_the_total(
    draw: Callable[[np.random.Generator, tuple[int, int, int]], Float64],
    any_fires: Callable[[Float64], Float64],
    weights: list[float],
) -> None:
    total, num_benign = 0.02, 1600
    targets = shares(total, weights)
    assert sum(targets) == pytest.approx(total)
    scores = draw(np.random.default_rng(3), (len(weights), RESAMPLES // 2, num_benign))
    rates = []
    for own, target in zip(scores, targets, strict=True):
        kept = (exceedances(num_benign, target) or 0) + 1
        tops = -np.partition(-own, kept, axis=1)[:, :kept]
        tops = np.sort(tops, axis=1)[:, ::-1]
        rates.append([1 - (threshold_for(row.tolist(), num_benign, target) or 0) for row in tops])
    broken = np.mean(any_fires(np.array(rates)) > total)
    assert broken <= RISK + MONTE_CARLO * np.sqrt(2)


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [2.0, -1.0]])
def test_a_detector_without_a_share_is_refused(weights: list[float]) -> None:
    with pytest.raises(CalibrationError, match="above 0"):
        shares(0.01, weights)


# --- what stands on the card ----------------------------------------------------------------------------------------


def made(statistics: Float64, *, target: float = 0.01, method: ThresholdMethod = ThresholdMethod.PAC) -> Calibration:
    rows = [Example(text=f"row {i}", label=0, source="s", group=str(i)) for i in range(statistics.size)]
    return calibrate(
        statistics,
        rows,
        stage=Stage.PROMPT,
        text_format=Format.CHAT,
        aggregate=Max(),
        target_fpr=target,
        confidence=0.95,
        method=method,
    )


def test_a_conformal_card_certifies_nothing_and_says_what_is_missing() -> None:
    found = made(np.arange(99.0), method=ThresholdMethod.CONFORMAL)
    assert (found.threshold, found.certified, shortfall(found)) == (98.0, False, "")
    few = made(np.arange(60.0), method=ThresholdMethod.CONFORMAL)
    assert (few.threshold, few.certified) == (59.0, False)
    assert "39 more benign requests needed for a false-positive rate of 0.01 (60 given)" in shortfall(few)
    with pytest.raises(ValueError, match="states no confidence"):
        Calibration.model_validate(found.model_dump() | {"certified": True})


def test_the_bound_is_at_most_the_target_where_it_is_certified() -> None:
    rng = np.random.default_rng(0)
    for count in (299, 1000, 2345):
        promise = Promise(target_fpr=0.01)
        assert bound_of(made(rng.random(count)), promise) <= 0.01
    assert bound_of(made(rng.random(298)), promise) > 0.01
    assert Promise(target_fpr=0.01).needed == benign_needed(0.01)


def test_ties_never_fire_more_than_allowed() -> None:
    statistics = np.repeat([3.0, 2.0, 1.0, 0.0], [2, 10, 100, 888])
    found = made(statistics)
    assert found.threshold == 2.0
    assert np.sum(statistics > found.threshold) == 2


def test_fewer_defined_statistics_than_may_fire() -> None:
    """12 of 2,000 may fire and only 9 ever could: the lowest of them is proved."""
    statistics = np.full(2000, -np.inf)
    statistics[:9] = np.arange(9.0)
    found = made(statistics)
    assert (found.threshold, found.certified) == (0.0, True)
    with pytest.raises(CalibrationError, match="at least one must be finite"):
        made(np.full(400, -np.inf))
