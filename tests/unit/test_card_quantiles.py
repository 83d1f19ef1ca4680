"""The benign statistics in brief on a card: what a calibration writes is what drift is measured against."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from monitor.drift import ScoreDrift
from probes.aggregate.max import Max
from probes.card import Calibration, Card, Format, Stage
from probes.fit.calibration.calibrate import calibrate
from probes.fit.rows.example import Example
from tests.unit.artifacts import calibration, make_card


def calibrated(statistics: np.ndarray) -> Calibration:
    examples = [
        Example(text=f"request {number}", label=0, source="test", group=str(number))
        for number in range(len(statistics))
    ]
    return calibrate(
        statistics,
        examples,
        stage=Stage.PROMPT,
        text_format=Format.CHAT,
        aggregate=Max(),
        target_fpr=0.01,
        confidence=0.95,
    )


def test_a_calibration_keeps_quantiles_of_what_is_defined() -> None:
    rng = np.random.default_rng(0)
    statistics = rng.normal(size=700)
    statistics[:50] = -np.inf
    found = calibrated(statistics).quantiles
    finite = np.sort(statistics[50:])
    assert (len(found), found[0], found[-1]) == (101, finite[0], finite[-1])
    assert set(found) <= set(finite)
    shares = np.searchsorted(finite, found, side="right") / len(finite)
    assert np.abs(shares - np.linspace(0, 1, 101)).max() <= 1 / len(finite) + 1e-12


def test_the_rows_of_a_calibration_have_not_drifted_from_it() -> None:
    statistics = np.random.default_rng(1).normal(size=500)
    found = calibrated(statistics)
    drift = ScoreDrift(found.quantiles, found.num_benign)
    for value in statistics:
        drift.add(float(value))
    assert drift.psi() < 0.03  # of which 0.025 for the two ends, where nothing lies
    assert drift.ks() < 0.012


def test_they_stand_on_the_card_and_older_cards_stay_as_they_are() -> None:
    old = make_card(calibrations=[calibration()])
    assert "quantiles" not in old.model_dump_json()
    new = make_card(calibrations=[calibrated(np.arange(400.0))])
    again = Card.model_validate_json(new.model_dump_json())
    assert again == new
    assert again.calibrations[0].quantiles[50] == 199


@pytest.mark.parametrize("wrong", [(1.0,), (2.0, 1.0), (0.0, float("nan"))])
def test_wrong_quantiles_are_refused(wrong: tuple[float, ...]) -> None:
    fields = calibration().model_dump() | {"quantiles": wrong}
    with pytest.raises(ValidationError, match="quantiles"):
        Calibration.model_validate(fields)
