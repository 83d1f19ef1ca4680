"""Weighted sums: of statistics or of probabilities, each request's for itself, told and counted by its own name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from monitor.exporter import Exporter
from monitor.monitor import Monitor
from monitor.report import make_report, take_tally
from probes.card import Format
from serving.engine.records import Records
from tests.unit.artifacts import calibration, make_card, plan_of, policy_text, unit_artifact
from tests.unit.script import Case, Script, chat
from tests.unit.test_conditions import NAMES, artifacts, case_of, one_rule


def test_probabilities_are_added_up_by_the_cards_scaling(tmp_path: Path) -> None:
    def scaled(name: str, number: int, slope: float) -> Any:
        platt = {"slope": slope, "intercept": 0.5, "num_positive": 9, "num_negative": 9,
                 "ece_before": 0.1, "ece_after": 0.1, "data_digest": "0" * 64}  # fmt: skip
        known = calibration().model_dump() | {"platt": platt}
        return unit_artifact(make_card(name, calibrations=[calibration().model_validate(known)]), number)

    when = {
        "weigh": [{"detector": "a", "weight": 1}, {"detector": "b", "weight": -0.5}],
        "stage": "prompt", "sum": "probability", "above": {"value": 0.1},
    }  # fmt: skip
    cards = {"a": scaled("a", 0, 2.0), "b": scaled("b", 1, -3.0)}
    case = Case(plan_of(tmp_path, policy_text(one_rule(when), names=["a", "b"]), cards))
    case.admit(num_prompt=2)
    case.see([[0, 0], [0.25, 0.75]])  # type: ignore[list-item]
    request = case.monitor.get("a")
    assert request is not None
    seen = case.monitor.snapshot([request])
    statistics, fired = seen.statistics, seen.fired
    expected = 1 / (1 + np.exp(-(2.0 * 0.25 + 0.5))) - 0.5 / (1 + np.exp(-(-3.0 * 0.75 + 0.5)))
    assert case.plan.checks[2].detector == "1*a-0.5*b"
    assert statistics[0, 2] == pytest.approx(expected, abs=1e-12)
    assert fired[0].tolist() == [False, False, True]


def test_a_sum_does_not_depend_on_who_is_summed_beside_it(tmp_path: Path) -> None:
    when = {
        "weigh": [{"detector": name, "weight": 0.1, "aggregate": {"kind": "mean"}} for name in NAMES],
        "stage": "stream",
        "above": {"value": 99},
    }
    plan = plan_of(tmp_path, policy_text(one_rule(when), names=NAMES), artifacts())
    scores = np.random.default_rng(3).standard_normal((40, 4, 3)).astype(np.float32)

    def sums(company: int, *also: int) -> list[float]:
        """Those of the first request, when its last token is computed together with those of others."""
        monitor, script = Monitor(plan), Script(plan)
        names = [str(number) for number in range(company)]
        for name in names:
            monitor.admit(name, num_prompt=1, policy=None, fmt=Format.CHAT, prompt=chat(1))
        for part in (range(3), range(3, 4)):
            took_part = [number for number in range(company) if part.start == 0 or number in also or number == 0]
            rows = [(names[number], part, script.rows(scores[number][list(part)])) for number in took_part]
            monitor.observe(script.step(rows))
        live = monitor.get("0")
        assert live is not None
        return [float(value) for value in monitor.snapshot([live]).statistics[0]]

    # Beside neighbours, among slots of others, and far from the only other one.
    assert sums(1) == sums(2, 1) == sums(40, *range(40)) == sums(40, 2) == sums(40, 39)


def test_a_sum_is_told_and_counted_under_its_own_name(tmp_path: Path) -> None:
    when = {
        "weigh": [{"detector": "a", "weight": 2, "aggregate": {"kind": "max"}},
                  {"detector": "b", "weight": 0.5, "aggregate": {"kind": "mean"}}],
        "stage": "prompt", "above": {"value": 1},
    }  # fmt: skip
    case = case_of(tmp_path, one_rule(when), policy="expose: scores\nquantise: 0")
    case.admit(num_prompt=2)
    case.see([[0, 0, 0], [1, 3, 0]])  # type: ignore[list-item]
    ended = case.monitor.finish("a", num_positions=2, sampled=0, aborted=False)
    assert ended is not None
    records, registry = Records(case.plan), CollectorRegistry()
    report = make_report(case.monitor, [], [ended], take_tally(case.monitor, []))
    records.take_in(report)
    Exporter(case.plan, registry).record(report)
    record = records.get("a")
    assert record is not None
    shown = {item["name"]: (item["score"], item["threshold"], item["fired"]) for item in record.describe()["detectors"]}
    assert shown == {"a": (1, None, False), "b": (3, None, False), "2*a+0.5*b": (3.5, 1, True)}
    labels = {"detector": "2*a+0.5*b", "stage": "prompt", "aggregate": "sum", "segments": ""}
    assert registry.get_sample_value("telltale_detector_score_count", labels) == 1
    where = {"rule": "r", "detector": "2*a+0.5*b", "stage": "prompt", "format": "raw", "policy": "default"}
    assert registry.get_sample_value("telltale_detector_threshold", where) == 1
