"""From the monitor over the wire to the client: reports survive their encoding, records are what a reply says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import given

from monitor.monitor import Monitor
from monitor.report import (
    Decided,
    EndedReport,
    Steered,
    StepReport,
    TallyReport,
    Trail,
    decode_report,
    encode_report,
    make_report,
)
from monitor.report import take_tally as make_tally
from monitor.rollout import Subjects
from probes.card import Format, Platt, Stage
from serving.engine.carrier import CARRIER_ID, take_reports
from serving.engine.records import Record, Records
from tests.unit.artifacts import calibration, make_card, plan_of, policy_text, rule, unit_artifact
from tests.unit.script import Script, chat

RULES = "\n".join(
    [
        rule("prompt", when="aggregate: {kind: max}, above: {value: 1.0}", action="flag"),
        rule("stream", stage="stream", when="aggregate: {kind: max}, above: {value: 2.0}"),
    ]
)
counts = st.dictionaries(st.text(max_size=8), st.integers(0, 2**40), max_size=3)
numbers = st.floats(allow_nan=False)
steered = st.lists(
    st.builds(
        Steered, st.integers(0, 9), st.integers(0, 2**40), st.floats(0, allow_nan=False), st.floats(0, allow_nan=False)
    ),
    max_size=2,
)
trails = st.none() | st.builds(
    Trail, st.lists(st.text(max_size=9), max_size=2), st.dictionaries(st.integers(0, 99), st.integers(0, 2**40))
)
decisions = st.none() | st.builds(Decided, st.integers(0, 3), st.text(max_size=9), st.text(max_size=30))
ended_reports = st.builds(
    EndedReport,
    st.text(max_size=20),
    st.integers(0, 3),
    st.sampled_from(["chat", "raw"]),
    st.integers(0, 2**40),
    counts,
    st.lists(numbers, max_size=4),
    st.lists(st.booleans(), max_size=4),
    decisions,
    st.lists(st.text(max_size=9), max_size=2),
    steered,
    trails,
)
tallies = st.none() | st.builds(
    TallyReport,
    st.integers(0, 2**40),
    counts,
    counts,
    st.lists(st.tuples(*[st.text(max_size=9)] * 4, st.integers(0, 99)), max_size=3),
    st.lists(numbers, max_size=3),
    counts,
    st.integers(0, 2**40),
    counts,
)
reports = st.builds(
    StepReport,
    st.lists(st.text(max_size=20), max_size=3),
    st.lists(st.text(max_size=4), max_size=3),
    st.lists(st.integers(0, 9), max_size=3),
    st.binary(max_size=24),
    st.binary(max_size=24),
    st.binary(max_size=24),
    st.binary(max_size=24),
    st.dictionaries(st.text(max_size=9), decisions.filter(lambda decided: decided is not None), max_size=2),
    st.dictionaries(st.text(max_size=9), counts, max_size=2),
    st.dictionaries(st.text(max_size=9), st.lists(st.text(max_size=9), max_size=2), max_size=2),
    st.dictionaries(st.text(max_size=9), steered, max_size=2),
    st.lists(ended_reports, max_size=2),
    tallies,
)


@given(report=reports)
def test_a_report_survives_the_wire(report: StepReport) -> None:
    data = encode_report(report)
    assert data.dtype == np.uint8
    assert decode_report(data) == report


@given(data=st.binary(max_size=40))
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_report(np.frombuffer(data, dtype=np.uint8))


class Engine:
    """A monitor with its script, and the records that its reports make."""

    def __init__(self, folder: Path, *, policy: str = "", rules: str = "") -> None:
        plan = plan_of(
            folder, policy_text(rules or RULES, policy=policy), {"harm": unit_artifact(make_card(skip_first=1))}
        )
        self.monitor, self.script, self.records = Monitor(plan), Script(plan), Records(plan)

    def admit(self, name: str, num_prompt: int, subjects: Subjects | None = None) -> None:
        prompt = chat(num_prompt)
        self.monitor.admit(name, num_prompt=num_prompt, policy=None, fmt=Format.CHAT, prompt=prompt, subjects=subjects)

    def step(
        self, rows: dict[str, tuple[int, list[float]]], ends: dict[str, tuple[int, int]] | None = None
    ) -> StepReport:
        """One step: of each request its first position and scores; then the requests that end with it."""
        parts = [(name, range(at, at + len(s)), self.script.rows(s)) for name, (at, s) in rows.items()]
        self.monitor.observe(self.script.step(parts))
        ended = [
            item
            for name, (positions, sampled) in (ends or {}).items()
            if (item := self.monitor.finish(name, num_positions=positions, sampled=sampled, aborted=False)) is not None
        ]
        going = [request for name in rows if (request := self.monitor.get(name)) is not None]
        report = decode_report(encode_report(make_report(self.monitor, going, ended, make_tally(self.monitor, [0.5]))))
        self.records.take_in(report)
        return report

    def record(self, name: str) -> Record:
        record = self.records.get(name)
        assert record is not None
        return record


def test_records_follow_the_steps(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    for name in ("a", "b"):
        engine.admit(name, 3)
    engine.step({"a": (0, [0, 0.5, 0.25]), "b": (0, [0, 1.5])})
    assert (engine.record("a").scored, engine.record("a").skipped) == (2, {"sink": 1})
    assert engine.record("a").statistics == [0.5, -math.inf]
    assert engine.record("a").decided is engine.record("b").decided is None
    report = engine.step({"b": (2, [0])})
    assert report.request_ids == ["b"]
    assert engine.record("b").fired == [True, False]
    assert engine.record("b").decided == Decided(1, "prompt", "I can't help with that.")
    assert engine.record("b").blocked_text is None
    assert engine.record("a").fired == [False, False]
    engine.step({"b": (3, [3.5])})
    assert engine.record("b").blocked_text == "I can't help with that."
    assert engine.records.get("c") is None


def test_a_gap_shows_in_the_record(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.admit("a", 3)
    report = engine.step({"a": (0, [0, math.nan, 0])})
    assert engine.record("a").skipped == {"sink": 1, "not_finite": 1}
    assert report.tally is not None
    assert (report.tally.gaps, report.tally.scored, report.tally.observe_seconds) == ({"not_finite": 1}, 1, [0.5])
    assert report.tally.acted == [("on_gap", "flag", "enforce", "default", 1)]


def test_a_record_stays_until_the_report_after_its_end(tmp_path: Path) -> None:
    """The last output of a request comes behind the report that ends it."""
    engine = Engine(tmp_path)
    engine.admit("a", 2)
    engine.admit("b", 1)
    engine.step({"a": (0, [0, 3.0])})
    held = engine.record("a")
    report = engine.step({"a": (2, [0.5]), "b": (0, [0])}, ends={"a": (4, 2)})
    assert [ended.request_id for ended in report.ended] == ["a"]
    assert report.request_ids == ["b"]
    record = engine.record("a")
    assert record is held  # outputs that were made before point to the same record
    assert (record.ended, record.scored, record.skipped) == (True, 2, {"sink": 1, "final": 1})
    assert record.statistics == [3.0, 0.5]
    engine.step({"b": (1, [0])})
    assert engine.records.get("a") is None
    assert engine.record("b").scored == 1


@pytest.mark.parametrize("live", [True, False])
def test_what_a_client_is_told(tmp_path: Path, live: bool) -> None:
    """The same while a request runs (a stop string ends it in the API process) as after its end."""
    expected = {"action": "block", "rule": "stream", "detectors": []}
    common = {"name": "harm", "scored": 3, "skipped": {"sink": 1, "final": 1}}
    for expose in ("actions", "scores"):
        engine = Engine(tmp_path, policy=f"expose: {expose}\nquantise: 0")
        engine.admit("a", 3)
        engine.step({"a": (0, [0, 0.12345678, 0])})
        engine.step({"a": (3, [2.5])}, ends=None if live else {"a": (5, 2)})
        record = engine.record("a")
        record.close(5)
        described = json.loads(json.dumps(record.describe()))
        detectors: list[dict[str, Any]] = [
            {**common, "stage": "prompt", "fired": False},
            {**common, "stage": "stream", "fired": True},
        ]
        if expose == "scores":
            detectors[0] |= {"score": 0.1235, "threshold": 1.0}
            detectors[1] |= {"score": 2.5, "threshold": 2.0}
        assert described == {**expected, "detectors": detectors}


def platt(slope: float = 2.0) -> Platt:
    return Platt(
        slope=slope, intercept=-1.0, num_positive=50, num_negative=50, ece_before=0.2, ece_after=0.02,
        data_digest="0" * 64,
    )  # fmt: skip


@pytest.mark.parametrize("expose", ["actions", "scores"])
def test_a_probability_stands_beside_the_score_it_was_fitted_on(tmp_path: Path, expose: str) -> None:
    """Of the same stage, format, aggregate and text; only where scores are exposed."""
    made = [
        calibration(Stage.PROMPT).model_copy(update={"platt": platt()}),
        calibration(Stage.PROMPT, fmt=Format.RAW),
        calibration(Stage.STREAM).model_copy(update={"platt": platt(1e6)}),
    ]
    rules = "\n".join(
        [
            rule("same"),
            rule("other", when="aggregate: {kind: mean}, above: {value: 3}"),
            rule("some", when="segments: [tool]"),
            rule("stream", stage="stream"),
        ]
    )
    artifact = unit_artifact(make_card(calibrations=made))
    plan = plan_of(tmp_path, policy_text(rules, policy=f"expose: {expose}\nquantise: 0"), {"harm": artifact})
    record = Record(plan)
    record.fmt, record.statistics = Format.CHAT, [0.75] * len(plan.checks)
    found = {check.stage.value: {} for check in plan.checks}
    for check, told in zip(plan.checks, record.describe()["detectors"], strict=True):
        found[check.stage.value][(check.aggregate.kind, check.segments is None)] = told.get("probability")
    expected = round(1 / (1 + math.exp(-0.5)), 4) if expose == "scores" else None
    assert found["prompt"] == {("max", True): expected, ("mean", True): None, ("max", False): None}
    assert found["stream"] == {("max", True): 1.0 if expose == "scores" else None}  # and no overflow
    record.fmt = Format.RAW
    assert not any("probability" in told for told in record.describe()["detectors"])
    record.fmt, record.statistics = Format.CHAT, [-math.inf] * len(plan.checks)
    assert not any("probability" in told for told in record.describe()["detectors"])


def test_what_is_undefined_or_uncalibrated_is_null(tmp_path: Path) -> None:
    text = policy_text(RULES, policy="expose: scores")
    artifact = unit_artifact(make_card(formats=[Format.CHAT]))
    plan = plan_of(tmp_path, text, {"harm": artifact})
    record = Record(plan)
    record.fmt = Format.RAW
    for detector in record.describe()["detectors"]:
        assert (detector["score"], detector["threshold"], detector["fired"]) == (None, None, False)


def test_allow_has_no_rule(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.admit("a", 2)
    engine.step({"a": (0, [0, 0])})
    described = engine.record("a").describe()
    assert (described["action"], described["rule"]) == ("allow", None)
    assert not {"score", "threshold"} & set(described["detectors"][0])


def test_the_carrier_is_taken_out_and_nothing_else(tmp_path: Path) -> None:
    from vllm.v1.engine import EngineCoreOutput

    engine = Engine(tmp_path)
    engine.admit("a", 1)
    report = engine.step({"a": (0, [0])})
    carrier = EngineCoreOutput(request_id=CARRIER_ID, new_token_ids=[], routed_experts=encode_report(report))
    # A client cannot choose the engine's id; still, an output without a report is not ours.
    others = [EngineCoreOutput(request_id=name, new_token_ids=[1]) for name in ("a", "b", CARRIER_ID)]
    reports, rest = take_reports([carrier, *others])
    assert reports == [report]
    assert all(left is right for left, right in zip(rest, others, strict=True))
