"""The rule of `telltale gate check`: what it says of figures, and how often it errs on simulated builds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import norm, spearmanr

from probes.fit.staleness.comparison import UNLABELLED, Comparison, ComparisonError, Pairs, compare
from probes.fit.staleness.decision import EXIT_CODES, Claim, Decision, Margins, Verdict, decide

TARGET = 0.01
CONFIDENCE = 0.95
POSITIVES, NEGATIVES = 200, 400
FEW, MANY = 16, 100
"""Simulated builds: in the quick tests, and in the slow one that tells rates."""


def drawn(
    seed: int,
    *,
    noise: float = 0.0,
    shift: float = 0.0,
    blur: float = 0.0,
    positives: int = POSITIVES,
    negatives: int = NEGATIVES,
    distance: float = 2.5,
    rate: float = 0.006,
) -> tuple[Pairs, Claim]:
    """Gaussian statistics of two classes, and those of a new build.

    Args:
        seed: of all.
        noise: of each statistic on the new build, as rounding brings it.
        shift: of all.
        blur: further noise that makes it rank worse.
        positives: how many.
        negatives: how many.
        distance: between the classes.
        rate: true false-alarm rate of the threshold on the recorded build.
    """
    generator = np.random.default_rng(seed)
    labels = np.repeat([1, 0], [positives, negatives])
    before = generator.standard_normal(labels.size) + distance * labels
    after = before + np.hypot(noise, blur) * generator.standard_normal(labels.size) + shift
    claim = Claim(thresholds=(float(norm.isf(rate)),), target_fpr=TARGET, confidence=CONFIDENCE)
    return paired(claim, before, after, labels, np.arange(labels.size)), claim


def paired(claim: Claim, before: Any, after: Any, labels: Any, groups: Any) -> Pairs:
    """Statistics of requests that are all of one length."""
    fired = [claim.fires(values, np.ones(len(values), dtype=np.int64)) for values in (before, after)]
    return Pairs(before=before, after=after, labels=labels, groups=groups, fired_before=fired[0], fired_after=fired[1])


def judged(seed: int = 0, margins: Margins | None = None, **settings: Any) -> Decision:
    pairs, claim = drawn(seed, **settings)
    return decide(compare(pairs, confidence=CONFIDENCE, seed=seed), claim, margins or Margins())


def share(verdict: Verdict, runs: int = FEW, **settings: Any) -> float:
    return float(np.mean([judged(seed, **settings).verdict is verdict for seed in range(runs)]))


def blur_that_loses(loss: float, distance: float = 2.5) -> float:
    """Noise that takes so much of the true AUROC, norm.cdf(distance / sqrt 2)."""
    left = norm.ppf(norm.cdf(distance / np.sqrt(2)) - loss)
    return float(np.sqrt((distance / (np.sqrt(2) * left)) ** 2 - 1.0))


def test_exit_codes_are_distinct_and_are_not_those_of_errors() -> None:
    assert dict(EXIT_CODES) == {
        Verdict.PASS: 0, Verdict.STALE: 10, Verdict.DEGRADED: 11, Verdict.INCONCLUSIVE: 12
    }  # fmt: skip
    assert set(EXIT_CODES) == set(Verdict)


def test_an_unchanged_build_passes_always() -> None:
    """Also where the recorded build fires more often on these rows than it promises."""
    assert share(Verdict.PASS) == 1.0
    assert share(Verdict.PASS, rate=0.05) == 1.0
    assert share(Verdict.PASS, positives=150, negatives=300) == 1.0


def test_rounding_passes_nearly_always() -> None:
    assert share(Verdict.PASS, noise=0.03, negatives=1000) >= 0.95


def test_what_lost_twice_the_margin_does_not_pass() -> None:
    assert share(Verdict.PASS, blur=blur_that_loses(0.04)) == 0.0


def test_what_lost_much_is_degraded() -> None:
    assert share(Verdict.DEGRADED, blur=blur_that_loses(0.1)) >= 0.95
    assert judged(blur=50.0).verdict is Verdict.DEGRADED


@pytest.mark.parametrize("shift", [0.8, -0.8])
def test_a_shift_is_stale_whichever_way_it_goes(shift: float) -> None:
    assert share(Verdict.STALE, shift=shift) >= 0.95
    reasons = " ".join(judged(shift=shift).reasons)
    assert ("rate is surely above 0.01" if shift > 0 else "surely catches 0.05 less") in reasons


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("verdict", "most", "settings"),
    [
        (Verdict.PASS, 0.05, {"blur": blur_that_loses(0.04), "positives": 150}),
        (Verdict.PASS, 0.05, {"blur": blur_that_loses(0.04), "positives": 300, "negatives": 1000}),
        # At the very margin the bound errs as often as its confidence says; the other parts can only lower it.
        (Verdict.PASS, 0.05 + 0.05, {"blur": blur_that_loses(0.02), "positives": 300, "negatives": 1000}),
        # Noise that takes a hundredth of the margin.
        (Verdict.DEGRADED, 0.05 + 0.05, {"blur": blur_that_loses(0.0002), "positives": 150, "negatives": 150}),
        (Verdict.STALE, 0.05 + 0.05, {"blur": blur_that_loses(0.0002), "positives": 150, "negatives": 150}),
        # Twice as many false alarms as promised.
        (Verdict.PASS, 0.05, {"shift": float(norm.isf(0.006) - norm.isf(0.02)), "negatives": 1000}),
    ],
)
def test_rates_of_errors(verdict: Verdict, most: float, settings: dict[str, Any]) -> None:
    assert share(verdict, runs=MANY, **settings) <= most


def test_too_few_rows_are_inconclusive_and_it_says_how_many_are_needed() -> None:
    few = judged(positives=40, negatives=100)
    assert few.verdict is Verdict.INCONCLUSIVE
    needs = " ".join(few.needs)
    assert "at least 149 independent positive" in needs
    assert "at least 299 independent benign rows" in needs
    assert "at least 59 independent positive rows" in needs
    # With as many it is sure, with one less it is not.
    assert judged(positives=149, negatives=299).verdict is Verdict.PASS
    assert judged(positives=148, negatives=299).verdict is Verdict.INCONCLUSIVE
    assert judged(positives=149, negatives=298).verdict is Verdict.INCONCLUSIVE
    # Five rows of each label are no reason to condemn it, however it ranks them.
    assert judged(positives=5, negatives=5, blur=50.0).verdict is Verdict.INCONCLUSIVE


def test_rows_of_one_group_count_once() -> None:
    pairs, claim = drawn(0)
    half = paired(claim, pairs.before, pairs.after, pairs.labels, pairs.groups // 4)
    found = compare(half, confidence=CONFIDENCE, seed=0)
    assert found.positive is not None
    assert (found.positive.num, found.positive.groups) == (200, 50)
    assert decide(found, claim, Margins()).verdict is Verdict.INCONCLUSIVE


def unlabelled(after: float, labels: int) -> Decision:
    pairs, claim = drawn(0, noise=after)
    blind = paired(claim, pairs.before, pairs.after, np.where(pairs.labels == 1, labels, pairs.labels), pairs.groups)
    return decide(compare(blind, confidence=CONFIDENCE, seed=0), claim, Margins())


def test_without_positive_rows_it_passes_only_if_requests_are_ordered_alike() -> None:
    assert unlabelled(0.03, UNLABELLED).verdict is Verdict.PASS
    blind = unlabelled(0.5, UNLABELLED)
    assert blind.verdict in {Verdict.INCONCLUSIVE, Verdict.STALE}
    assert "whether it ranks as well is not known" in blind.reasons[0]


def test_scores_that_have_collapsed_below_the_threshold_never_pass() -> None:
    """No false alarms at all: the promise is kept, and the detector is dead."""
    pairs, claim = drawn(0)
    benign = pairs.labels == 0
    for dead in (np.full(benign.sum(), -9.0), pairs.before[benign][::-1] / 10 - 9):
        blind = paired(claim, pairs.before[benign], dead, pairs.labels[benign], pairs.groups[benign])
        found = compare(blind, confidence=CONFIDENCE, seed=0)
        assert decide(found, claim, Margins()).verdict is Verdict.INCONCLUSIVE


def test_without_benign_rows_nothing_is_said_of_false_alarms() -> None:
    pairs, claim = drawn(0, negatives=0)
    decision = decide(compare(pairs, confidence=CONFIDENCE, seed=0), claim, Margins())
    assert decision.verdict is Verdict.INCONCLUSIVE
    assert "299 benign rows" in " ".join(decision.needs)


def test_margins_move_the_verdict_one_way() -> None:
    """What passes with a margin passes with a wider one."""
    for seed in range(8):
        pairs, claim = drawn(seed, blur=0.4)
        found = compare(pairs, confidence=CONFIDENCE, seed=seed)
        passes = [
            decide(found, claim, Margins(auroc=margin, tpr=margin)).verdict is Verdict.PASS
            for margin in (0.02, 0.05, 0.1, 0.3)
        ]
        assert passes == sorted(passes)


def test_the_figures_are_those_of_plain_formulas() -> None:
    pairs, claim = drawn(3, noise=0.3, shift=0.2)
    found: Comparison = compare(pairs, confidence=CONFIDENCE, seed=3)
    before, after = pairs.before > claim.thresholds[0], pairs.after > claim.thresholds[0]
    benign, positive = pairs.labels == 0, pairs.labels == 1
    assert found.benign is not None
    assert found.positive is not None
    assert found.ranking is not None
    assert found.benign.alarms_after == int((after & benign).sum())
    assert found.benign.newly == int((after & ~before & benign).sum())
    assert found.benign.no_longer == int((before & ~after & benign).sum())
    assert found.positive.loss.value == pytest.approx(before[positive].mean() - after[positive].mean())
    wins = pairs.after[positive][:, None] > pairs.after[benign][None]
    assert found.ranking.auroc_after == pytest.approx(wins.mean())
    for bounds in (found.ranking.loss, found.positive.loss):
        assert bounds.low <= bounds.value <= bounds.high
    assert found.agreement.rank_correlation == pytest.approx(spearmanr(pairs.before, pairs.after).statistic)
    spread = pairs.before.std()
    assert found.agreement.largest_shift == pytest.approx(np.abs(pairs.after - pairs.before).max() / spread)
    assert found.agreement.mean_shift == pytest.approx((pairs.after - pairs.before).mean() / spread)


def test_statistics_that_are_not_defined_are_counted_and_never_fire() -> None:
    pairs, claim = drawn(0)
    after = pairs.after.copy()
    after[:100] = -np.inf  # positives that are too short under another template
    found = compare(paired(claim, pairs.before, after, pairs.labels, pairs.groups), confidence=CONFIDENCE, seed=0)
    assert (found.agreement.undefined_before, found.agreement.undefined_after, found.agreement.num) == (0, 100, 500)
    assert decide(found, claim, Margins()).verdict is Verdict.DEGRADED


@pytest.mark.parametrize("broken", ["nan", "short", "empty"])
def test_what_cannot_be_compared_is_refused(broken: str) -> None:
    values, count = np.zeros(4), {"short": 3, "empty": 0}.get(broken, 4)
    if broken == "nan":
        values[1] = np.nan
    rows = values[:count] if broken == "empty" else values
    with pytest.raises(ComparisonError):
        Pairs(
            before=rows, after=values[:count], labels=np.zeros(count, np.int64), groups=np.arange(count),
            fired_before=rows > 0, fired_after=values[:count] > 0,
        )  # fmt: skip


def test_requests_fire_above_the_threshold_for_their_length() -> None:
    claim = Claim(thresholds=(1.0, 2.0, 3.0), max_tokens=(10, 20), target_fpr=TARGET, confidence=CONFIDENCE)
    lengths = np.array([1, 10, 11, 20, 21, 500])
    limits = np.array([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
    assert not claim.fires(limits, lengths).any()
    assert claim.fires(limits + 1e-9, lengths).all()
    with pytest.raises(ValidationError, match="one threshold more"):
        Claim(thresholds=(1.0,), max_tokens=(10,), target_fpr=TARGET, confidence=CONFIDENCE)
