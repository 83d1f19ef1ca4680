"""Platt scaling: sklearn's numbers, and probabilities that fit better than the statistic taken as a logit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import expit
from sklearn.calibration import _SigmoidCalibration

from probes.fit.calibration.platt import PlattError, Sigmoid, fit_platt, fit_sigmoid
from probes.fit.rows.example import Example

Float64 = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def drawn(count: int, *, slope: float, intercept: float, seed: int = 0) -> tuple[Float64, Labels]:
    """Statistics, and labels that are 1 with the probability that a sigmoid of them says."""
    rng = np.random.default_rng(seed)
    statistics = rng.standard_normal(count) * 3
    return statistics, (rng.random(count) < expit(slope * statistics + intercept)).astype(np.int64)


def rows(labels: Labels, *, groups: int | None = None) -> list[Example]:
    return [
        Example(text=f"row {number}", label=int(label), source="s", group=str(number % groups if groups else number))
        for number, label in enumerate(labels)
    ]


@pytest.mark.parametrize(("slope", "intercept", "count"), [(0.4, -1.5, 900), (3.0, 4.0, 200), (1e-3, 0.2, 500)])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (250.0, -4000.0)])
def test_the_sigmoid_is_sklearns(slope: float, intercept: float, count: int, scale: float, shift: float) -> None:
    statistics, labels = drawn(count, slope=slope, intercept=intercept)
    statistics = statistics * scale + shift
    ours, theirs = fit_sigmoid(statistics, labels), _SigmoidCalibration().fit(statistics, labels)
    np.testing.assert_allclose(ours.probability(statistics), theirs.predict(statistics), atol=2e-4)


def test_what_made_the_labels_is_found() -> None:
    statistics, labels = drawn(40_000, slope=0.7, intercept=-1.2)
    found = fit_sigmoid(statistics, labels)
    assert (found.slope, found.intercept) == pytest.approx((0.7, -1.2), abs=0.05)
    assert Sigmoid(0.7, -1.2).probability(np.array([-np.inf]))[0] == 0.0


def test_labels_that_can_be_parted_give_the_optimum() -> None:
    """Plain logistic regression would have no solution. With targets off 0 and 1 the gradient vanishes somewhere."""
    statistics = np.arange(40.0)
    labels = (statistics >= 20).astype(np.int64)
    missed = fit_sigmoid(statistics, labels).probability(statistics) - np.where(labels == 1, 21 / 22, 1 / 22)
    assert missed.sum() == pytest.approx(0, abs=1e-6)
    assert (missed * statistics).sum() == pytest.approx(0, abs=1e-4)


def test_the_error_falls_and_is_measured_on_other_rows() -> None:
    statistics, labels = drawn(3000, slope=0.3, intercept=-1.0)
    found = fit_platt(statistics, rows(labels))
    assert found.ece_before > 0.15
    assert found.ece_after < 0.04
    assert (found.num_positive, found.num_negative) == (labels.sum(), 3000 - labels.sum())
    # Labels that have nothing to do with the statistic: an honest error, not that of a fit to these rows.
    noise = np.random.default_rng(3).integers(0, 2, 200)
    assert fit_platt(np.random.default_rng(4).standard_normal(200), rows(noise)).ece_after > 0.02


def test_rows_without_a_statistic_are_left_out() -> None:
    statistics, labels = drawn(300, slope=1.0, intercept=0.0)
    some = np.concatenate([statistics, np.full(50, -np.inf)])
    found = fit_platt(some, rows(np.concatenate([labels, np.ones(50, dtype=np.int64)])))
    assert found == fit_platt(statistics, rows(labels))


def test_too_few_labelled_groups_are_refused() -> None:
    statistics, labels = drawn(100, slope=1.0, intercept=0.0)
    with pytest.raises(PlattError, match=r"4 groups.*label 0"):
        fit_platt(statistics, rows(labels, groups=4))
    with pytest.raises(PlattError, match=r"0 groups.*label 1"):
        fit_platt(statistics, rows(np.zeros_like(labels)))
