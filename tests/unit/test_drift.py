"""Drift: what stays as it was is called so, what moves is found, and the test of the alarm rate keeps its error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from monitor.drift import ENOUGH, WINDOW, AlarmRateTest, ScoreDrift, Share

Float64 = npt.NDArray[np.float64]
LEVELS = np.linspace(0, 1, 101)


def reference(values: Sequence[float] | Float64) -> list[float]:
    return [float(value) for value in np.quantile(values, LEVELS, method="inverted_cdf")]


def compared(benign: Float64, live: Float64) -> ScoreDrift:
    drift = ScoreDrift(reference(benign), len(benign))
    for value in live:
        drift.add(float(value))
    return drift


@pytest.mark.parametrize("num_benign", [300, 1500])
def test_the_same_distribution_is_called_so(num_benign: int) -> None:
    rng = np.random.default_rng(0)
    found = [compared(rng.normal(size=num_benign), rng.normal(size=WINDOW)) for _ in range(60)]
    assert max(drift.psi() for drift in found) < 0.25
    assert np.median([drift.psi() for drift in found]) < 0.1
    assert max(drift.ks() for drift in found) < 0.2


@pytest.mark.parametrize(
    ("name", "live"),
    [
        ("moved", lambda rng: rng.normal(size=WINDOW) + 1.0),
        ("wider", lambda rng: rng.normal(size=WINDOW) * 2.5),
        ("narrower", lambda rng: rng.normal(size=WINDOW) * 0.3),
        ("a tenth far above all", lambda rng: np.concatenate([rng.normal(size=450), np.full(50, 9.0)])),
        ("all below all", lambda rng: np.full(WINDOW, -9.0)),
    ],
)
def test_what_moves_is_found(name: str, live: object) -> None:
    rng = np.random.default_rng(1)
    assert callable(live)
    assert compared(rng.normal(size=1000), live(rng)).psi() > 0.25, name


def test_the_distance_is_the_textbooks_up_to_the_grid() -> None:
    rng = np.random.default_rng(2)
    for shift in (0.0, 0.2, 0.8):
        benign, live = rng.normal(size=2000), rng.normal(size=WINDOW) + shift
        truth = kstest(live, np.sort(benign)).statistic
        assert compared(benign, live).ks() == pytest.approx(truth, abs=0.012)


def test_values_that_are_all_equal() -> None:
    """A silent latent is 0 on every benign request: any other value is drift, 0 is none."""
    silent = ScoreDrift([0.0] * 101, 1000)
    for _ in range(WINDOW):
        silent.add(0.0)
    assert silent.psi() == pytest.approx(0.0, abs=0.05)
    assert silent.ks() < 0.01
    for _ in range(WINDOW // 2):
        silent.add(3.0)
    assert silent.psi() > 1
    assert silent.ks() == pytest.approx(0.5, abs=0.01)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-5, 5).map(lambda value: round(value, 1)), min_size=20, max_size=80),
    st.lists(st.floats(-6, 6).map(lambda value: round(value, 1)), min_size=1, max_size=120),
)
def test_numbers_stay_in_their_ranges_and_the_window_forgets(benign: list[float], live: list[float]) -> None:
    drift = ScoreDrift(reference(benign), len(benign), window=50)
    fresh = ScoreDrift(reference(benign), len(benign), window=50)
    for value in live:
        drift.add(value)
    for value in live[-50:]:
        fresh.add(value)
    assert (drift.psi(), drift.ks()) == (fresh.psi(), fresh.ks())
    assert drift.psi() >= 0
    assert 0 <= drift.ks() <= 1


def test_little_is_not_enough() -> None:
    drift, share = ScoreDrift(reference(np.arange(100.0)), 100), Share()
    for number in range(ENOUGH - 1):
        drift.add(float(number))
        share.add(True)
    assert not (drift.knows_enough or share.knows_enough)
    drift.add(0.0)
    share.add(False)
    assert drift.knows_enough
    assert share.knows_enough
    assert share.value == 1 - 1 / ENOUGH


def ever_rejects(rng: np.random.Generator, rate: float, target: float, requests: int, error: float) -> bool:
    test = AlarmRateTest(target, error=error, every=200)
    return any(test.add(fired=bool(fired)) for fired in rng.random(requests) < rate)


def test_the_error_holds_however_often_one_looks() -> None:
    """Looked at after each of 3,000 requests, at exactly the promised rate: in 200 runs at most 5 % reject, ever.

    By the binomial law 200 runs of a test with an error of 0.05 stay below 21 with probability 0.999.
    """
    rng = np.random.default_rng(3)
    rejected = sum(ever_rejects(rng, 0.02, 0.02, 3000, 0.05) for _ in range(200))
    assert rejected < 21


def test_a_test_that_is_looked_at_as_if_once_would_not_hold() -> None:
    """The same requests, judged at the 5 % of one look after each: a quarter of the runs reject."""
    rng = np.random.default_rng(3)
    rejected = 0
    for _ in range(100):
        fired = np.cumsum(rng.random(3000) < 0.02)
        seen = np.arange(1, 3001)
        deviation = (fired - 0.02 * seen) / np.sqrt(seen * 0.02 * 0.98)
        rejected += bool((deviation[100:] > 1.645).any())
    assert rejected > 15


@settings(max_examples=30, deadline=None)
@given(st.floats(0.001, 0.9), st.integers(1, 12))
def test_the_bet_is_fair(target: float, steps: int) -> None:
    """At the promised rate the expected wealth is what it was: over all outcomes of some requests it adds up to 1."""
    total = 0.0
    for outcome in range(2**steps):
        fired = [bool(outcome >> place & 1) for place in range(steps)]
        test = AlarmRateTest(target, error=1e-300, every=10_000)
        for one in fired:
            test.add(fired=one)
        chance = math.prod(target if one else 1 - target for one in fired)
        total += chance * math.exp(test.log_evidence())
    # The bet that begins first is given half of the wealth; the rest is kept for later ones.
    assert total == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize(("rate", "within"), [(0.03, 2500), (0.05, 700), (0.5, 60)])
def test_more_than_was_promised_is_shown(rate: float, within: int) -> None:
    rng = np.random.default_rng(4)
    needed = []
    for _ in range(20):
        test = AlarmRateTest(0.01)
        needed.append(next(n for n in range(1, 20_000) if test.add(fired=bool(rng.random() < rate))))
    assert np.median(needed) < within


def test_a_change_after_long_quiet_is_shown_and_memory_stays_bounded() -> None:
    rng = np.random.default_rng(5)
    test = AlarmRateTest(0.01)
    assert not any(test.add(fired=bool(fired)) for fired in rng.random(60_000) < 0.002)
    needed = next(n for n in range(1, 20_000) if test.add(fired=bool(rng.random() < 0.05)))
    assert needed < 1500
    assert all(value.size < 500 for value in vars(test).values() if isinstance(value, np.ndarray))


def test_it_begins_anew_and_asks_for_more_each_time() -> None:
    rng = np.random.default_rng(6)
    test = AlarmRateTest(0.01)
    shown = [n for n in range(20_000) if test.add(fired=bool(rng.random() < 0.1))]
    assert len(shown) > 20
    assert np.median(np.diff(shown)[-10:]) > np.median(np.diff(shown)[:10])
    assert not any(test.add(fired=False) for _ in range(1000))
    assert test.log_evidence() < 0
