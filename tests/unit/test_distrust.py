"""Positions that were read while nothing may be relied on: gaps, each once, and rules act on them all the same."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from monitor.types import Gap
from tests.unit.artifacts import rule
from tests.unit.script import Case, make_case

PROMPT = rule("prompt", when="aggregate: {kind: max}, above: {value: 1.0}", action="flag")
STREAM = rule("stream", stage="stream", when="aggregate: {kind: max}, above: {value: 1.0}")


def doubtful(case: Case, scores: list[float], start: int) -> tuple[str, str]:
    before = case.monitor.scored_of(["a", "nobody"])
    case.see(scores, start=start)
    case.monitor.distrust(before, Gap.CANARY)
    return case.state()


@pytest.mark.covers("canary: corrupted weights", "gap counted, on_gap followed")
@pytest.mark.parametrize("on_gap", ["block", "flag", "allow"])
def test_it_follows_on_gap(tmp_path: Path, on_gap: str) -> None:
    case = make_case(tmp_path, PROMPT, STREAM, policy=f"on_gap: {on_gap}")
    case.admit(num_prompt=3)
    assert case.see([0, 0, 0]) == ("allow", "")
    assert doubtful(case, [0.0], 3) == (on_gap, "" if on_gap == "allow" else "on_gap")
    request = case.monitor.get("a")
    assert request is not None
    assert request.gaps == {Gap.CANARY: 1}


def test_a_reading_that_may_be_wrong_is_no_reason_to_let_go(tmp_path: Path) -> None:
    case = make_case(tmp_path, PROMPT, STREAM, policy="on_gap: allow")
    case.admit(num_prompt=3)
    assert doubtful(case, [0, 0, 0], 0) == ("allow", "")
    assert doubtful(case, [2.0], 3) == ("block", "stream")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(steps=st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_every_position_is_counted_once(tmp_path: Path, steps: list[tuple[int, bool, bool]]) -> None:
    case = make_case(tmp_path, PROMPT, STREAM, policy="on_gap: flag", skip_first=2)
    case.admit(num_prompt=4)
    position, expected = 0, {Gap.CANARY: 0, Gap.NOT_FINITE: 0}
    for count, is_doubtful, is_broken in steps:
        scores = [0.0] * count
        if is_broken:
            scores[-1] = np.nan
            expected[Gap.NOT_FINITE] += 1
        if is_doubtful:
            doubtful(case, scores, position)
            finite = range(position, position + count - is_broken)
            expected[Gap.CANARY] += sum(place >= 2 for place in finite)
        else:
            case.see(scores, start=position)
        position += count
    tally = case.monitor.take_tally()
    ended = case.monitor.finish("a", num_positions=position + 1, sampled=1, aborted=False)
    assert ended is not None
    coverage = ended.coverage
    assert {gap: count for gap, count in coverage.gaps.items() if count} == {
        gap: count for gap, count in expected.items() if count
    }
    assert coverage.positions == position + 1
    assert tally.scored == coverage.scored
    assert tally.gaps == coverage.gaps
