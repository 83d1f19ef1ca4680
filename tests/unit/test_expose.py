"""What clients are told: no score by default, coarse ones where they may have them, and nothing of conversations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from monitor.yaml_file import PolicyError
from probes.card import Format, Platt
from serving.engine.records import Record
from tests.unit.artifacts import calibration, make_card, plan_of, policy_text, rule, unit_artifact
from tests.unit.test_session_rules import WHEN, over

PLATT = Platt(
    slope=2.0, intercept=-1.0, num_positive=9, num_negative=9, ece_before=0.1, ece_after=0.1, data_digest="0" * 64
)
CARD = make_card(calibrations=[calibration().model_copy(update={"platt": PLATT})])


def told(folder: Path, statistic: float, *, policy: str = "", rules: str = "") -> list[dict[str, Any]]:
    plan = plan_of(folder, policy_text(rules or rule("p"), policy=policy), {"harm": unit_artifact(CARD)})
    record = Record(plan)
    record.fmt, record.statistics = Format.CHAT, [statistic] * len(plan.checks)
    found: list[dict[str, Any]] = record.describe()["detectors"]
    return found


def test_by_default_no_number_is_told(tmp_path: Path) -> None:
    (found,) = told(tmp_path, 3.21)
    assert {"score", "probability", "threshold"} & found.keys() == set()
    assert "3.2" not in str(found)


@settings(max_examples=60, deadline=None)
@given(statistic=st.floats(-50, 50), step=st.sampled_from([0.25, 0.5, 3.0]))
def test_scores_within_one_step_look_the_same(
    tmp_path_factory: pytest.TempPathFactory, statistic: float, step: float
) -> None:
    """What is told hangs on the nearest multiple alone: score and probability, so no small step can be climbed."""
    folder = tmp_path_factory.mktemp("plan")
    policy = f"expose: scores\nquantise: {step}"
    (found,) = told(folder, statistic, policy=policy)
    nearest = round(statistic / step) * step
    assert found["score"] == pytest.approx(nearest, abs=1e-4)
    assert told(folder, nearest, policy=policy) == [found]
    assert found["probability"] == pytest.approx(1 / (1 + math.exp(1 - 2 * nearest)), abs=1e-4)


@pytest.mark.parametrize(("policy", "score"), [("", 3.0), ("quantise: 0", 3.2146)])
def test_coarse_is_the_default_and_exact_has_to_be_asked_for(tmp_path: Path, policy: str, score: float) -> None:
    (found,) = told(tmp_path, 3.21456, policy=f"expose: scores\n{policy}")
    assert found["score"] == score


def test_what_was_never_defined_stays_so(tmp_path: Path) -> None:
    (found,) = told(tmp_path, -math.inf, policy="expose: scores")
    assert found["score"] is None


def test_what_is_read_for_conversations_is_not_told(tmp_path: Path) -> None:
    rules = f"{rule('p')}\n{over('stop', when=WHEN + ', aggregate: {kind: mean}')}"
    assert told(tmp_path, 2.0, rules=rules, policy="expose: scores") == told(tmp_path, 2.0, policy="expose: scores")


@pytest.mark.parametrize("step", ["-1", ".nan", "coarse"])
def test_a_step_without_a_meaning_is_refused(tmp_path: Path, step: str) -> None:
    with pytest.raises(PolicyError, match="quantise"):
        told(tmp_path, 0.0, policy=f"quantise: {step}")
