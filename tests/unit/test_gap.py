"""Gaps: whatever keeps a position from being scored is counted once, with its reason, and follows ``on_gap``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from monitor.types import Action, ActionCode, Gap, Mode
from probes.bank import Bank
from probes.detectors.base import Detector, Directions, Float64
from probes.taps import Tap
from tests.unit.artifacts import D_MODEL, NUM_LAYERS, rule
from tests.unit.script import Case, make_case

PROMPT = rule("prompt", when="aggregate: {kind: max}, above: {value: 1.0}")
STREAM = rule("stream", stage="stream", when="aggregate: {kind: max}, above: {value: 1.0}")


class Root(Detector):
    """A detector that has no score for some rows although their readouts are finite."""

    kind = "root"

    @classmethod
    def from_artifact(cls, artifact: object, *, name: str) -> Root:
        return cls(name)

    def directions(self) -> tuple[Directions, ...]:
        return (Directions(Tap(0), np.eye(D_MODEL, 1), np.zeros(1)),)

    def score(self, readouts: Mapping[Tap, Float64]) -> Float64:
        values = readouts[Tap(0)][:, 0]
        return np.where(values >= 0, values, np.nan)


@pytest.mark.parametrize("decoding", [False, True])
def test_a_score_that_is_not_finite_is_a_gap(tmp_path: Path, decoding: bool) -> None:
    """NaN compares as false: unnoticed, it would be a pass."""
    plan = make_case(tmp_path, PROMPT, STREAM, policy="on_gap: block").plan
    bank = Bank([Root("harm")], d_model=D_MODEL, num_layers=NUM_LAYERS, capacity=plan.bank.capacity)
    case = Case(replace(plan, bank=bank))
    case.admit(num_prompt=2)
    assert case.see([0, 0.5]) == ("allow", "")
    assert case.see([-1.0] if decoding else [0.5, -1.0], start=2) == ("block", "on_gap")
    request = case.monitor.get("a")
    assert request is not None
    assert request.gaps == {Gap.NOT_FINITE: 1}


@pytest.mark.covers(["NaN in a readout", "infinite readout"], "gap counted, on_gap followed")
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("on_gap", ["block", "flag", "allow"])
@pytest.mark.parametrize("decoding", [False, True])
def test_a_readout_that_is_not_finite_is_a_gap(tmp_path: Path, broken: float, on_gap: str, decoding: bool) -> None:
    case = make_case(tmp_path, PROMPT, STREAM, policy=f"on_gap: {on_gap}")
    case.admit(num_prompt=3)
    if decoding:
        case.see([0, 0, 0])
        state = case.see([broken], start=3)
    else:
        state = case.see([0, broken, 0, 0])
    assert state == (on_gap, "on_gap" if on_gap != "allow" else "")
    ended = case.monitor.finish("a", num_positions=5, sampled=2, aborted=False)
    assert ended is not None
    assert ended.coverage.skipped() == {"sink": 1, "final": 1, "not_finite": 1}
    assert case.monitor.take_tally().acted == {("on_gap", Action(on_gap), Mode.ENFORCE, "default"): 1}


def test_a_broken_norm_is_a_gap_and_an_unused_column_is_not(tmp_path: Path) -> None:
    case = make_case(tmp_path, PROMPT)
    bank = case.plan.bank
    for column, action in ((bank.norm_column(bank.taps[0]), "flag"), (1, "allow")):
        case.admit(num_prompt=3)
        rows = case.script.rows([0, 0, 0])
        rows[1, column] = np.nan
        case.monitor.observe(case.script.step([("a", range(3), rows)]))
        assert case.state()[0] == action
        case.monitor.finish("a", num_positions=3, sampled=0, aborted=False)


def test_a_gap_does_not_hide_what_else_was_read(tmp_path: Path) -> None:
    case = make_case(tmp_path, PROMPT, policy="on_gap: flag")
    case.admit(num_prompt=3)
    assert case.see([0, np.nan, 9]) == ("block", "prompt")


@pytest.mark.covers("position that never came", "gap counted, on_gap followed")
def test_a_jump_in_positions_is_a_gap(tmp_path: Path) -> None:
    case = make_case(tmp_path, STREAM, policy="on_gap: block")
    case.admit(num_prompt=3)
    case.see([0, 0, 0])
    assert case.see([0], start=5) == ("block", "on_gap")
    request = case.monitor.get("a")
    assert request is not None
    assert request.gaps == {Gap.UNSEEN: 2}


@pytest.mark.covers("step without readouts", "gap counted, on_gap followed")
def test_lost_steps_are_gaps_once(tmp_path: Path) -> None:
    case = make_case(tmp_path, STREAM, policy="on_gap: block")
    case.admit(num_prompt=3)
    case.monitor.lose({"a": 3, "nobody": 3}, Gap.NO_READOUTS)
    assert case.state() == ("block", "on_gap")
    case.monitor.lose({"a": 3}, Gap.MONITOR_ERROR)
    case.monitor.lose({"a": 2}, Gap.MONITOR_ERROR)
    case.see([0, 0, 0])  # a repetition of what was lost
    ended = case.monitor.finish("a", num_positions=3, sampled=0, aborted=False)
    assert ended is not None
    assert ended.coverage.skipped() == {"no_readouts": 3}
    assert (ended.coverage.scored, ended.coverage.positions) == (0, 3)


def test_a_lost_end_of_the_prompt_does_not_stop_the_judgement(tmp_path: Path) -> None:
    case = make_case(tmp_path, PROMPT, policy="on_gap: allow")
    case.admit(num_prompt=4)
    assert case.see([0, 9]) == ("allow", "")
    case.monitor.lose({"a": 4}, Gap.NO_READOUTS)
    assert case.state() == ("block", "prompt")


@pytest.mark.covers("position that never came", "gap counted, on_gap followed")
def test_what_never_came_is_a_gap_at_the_end(tmp_path: Path) -> None:
    case = make_case(tmp_path, STREAM, policy="on_gap: flag")
    case.admit(num_prompt=3)
    case.see([0, 0, 0])
    ended = case.monitor.finish("a", num_positions=7, sampled=4, aborted=False)
    assert ended is not None
    assert ended.coverage.skipped() == {"sink": 1, "final": 1, "unseen": 3}
    assert ended.request.action is ActionCode.FLAG
    assert case.monitor.take_tally().gaps == {Gap.UNSEEN: 3}


@pytest.mark.covers("abort", "every position accounted for")
@pytest.mark.parametrize(
    ("seen", "num_positions", "sampled", "final"),
    [(0, 5, 0, 0), (2, 5, 0, 0), (3, 4, 1, 1), (3, 5, 2, 1), (4, 5, 2, 1), (3, 3, 0, 0)],
)
def test_what_an_abort_cut_off_is_nobodys_gap(
    tmp_path: Path, seen: int, num_positions: int, sampled: int, final: int
) -> None:
    case = make_case(tmp_path, STREAM, policy="on_gap: block", skip_first=0)
    case.admit(num_prompt=num_positions - sampled)
    if seen:
        case.see([0] * seen)
    ended = case.monitor.finish("a", num_positions=num_positions, sampled=sampled, aborted=True)
    assert ended is not None
    assert (ended.coverage.scored, ended.coverage.final, ended.coverage.gaps) == (seen, final, {})
    assert ended.request.action is ActionCode.ALLOW
