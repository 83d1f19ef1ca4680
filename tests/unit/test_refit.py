"""How a fit is repeated follows from what the card says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from probes.aggregate import Aggregator
from probes.aggregate.attention import Attention
from probes.aggregate.ema import Ema
from probes.aggregate.max import Max
from probes.aggregate.mean import Mean
from probes.artifact import Artifact
from probes.card import Stage
from probes.fit.evaluation.refit import Refit, fitter_of
from probes.fit.fitters.lda import Lda
from probes.fit.fitters.logistic import Logistic
from probes.fit.training.ensemble import SideBySide
from tests.unit.artifacts import calibration, make_card

KINDS = ("linear", "ensemble")
EMA = Ema(alpha=0.3)


def refit(aggregate: Aggregator, stage: Stage = Stage.PROMPT, *, kind: str = "linear", **chosen: Any) -> Refit:
    layers = (1, 3) if kind == "ensemble" else (1,)
    card = make_card("d", kind=kind, layers=layers).model_copy(update={"training": {"chosen": chosen}, "skip_first": 2})
    return Refit.of(Artifact(Path("d.safetensors"), card, {}), calibration(stage, aggregate=aggregate), kinds=KINDS)


@pytest.mark.parametrize(
    ("aggregate", "stage", "named", "fitted_on", "exact"),
    [
        (EMA, Stage.PROMPT, None, EMA, True),
        (EMA, Stage.PROMPT, EMA.config(), EMA, True),
        (EMA, Stage.PROMPT, {"kind": "mean"}, Mean(), False),
        (EMA, Stage.STREAM, None, EMA, False),
        (Max(), Stage.PROMPT, None, Mean(), False),
        (Max(), Stage.PROMPT, EMA.config(), EMA, False),
        (Max(), Stage.STREAM, {"kind": "max"}, Mean(), False),
    ],
)
def test_a_fit_rests_on_the_means_that_the_card_names(
    aggregate: Aggregator, stage: Stage, named: dict[str, Any] | None, fitted_on: Aggregator, exact: bool
) -> None:
    found = refit(aggregate, stage, **({} if named is None else {"fitted_on": named}))
    assert (found.fitted_on, found.aggregate, found.is_exact) == (fitted_on, aggregate, exact)
    assert (found.stage, found.skip_first) == (stage, 2)


def test_the_fitter_is_the_cards_own() -> None:
    assert refit(EMA, fitter={"kind": "lda"}).whole_fitter == Lda()
    assert refit(EMA).whole_fitter == Logistic(inverse_penalty=0.01)
    ensemble = refit(EMA, kind="ensemble", fitter={"kind": "lda"})
    assert ensemble.whole_fitter == SideBySide(member=Lda(), taps=2)
    assert [tap.layer for tap in ensemble.taps] == [1, 3]
    card = make_card("d")
    assert "names no fitter" in fitter_of(Artifact(Path("d.safetensors"), card, {}))[1]


def test_another_kind_lends_its_tap_and_nothing_else() -> None:
    """Its fitter is none of ours, and its aggregate takes more than one number a token."""
    found = refit(Attention(heads=2), kind="attention", fitter={"kind": "attention", "heads": 2})
    assert (found.aggregate, found.fitted_on) == (Mean(), Mean())
    assert found.whole_fitter == Logistic(inverse_penalty=0.01)
    assert [tap.layer for tap in found.taps] == [1]
