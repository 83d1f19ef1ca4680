"""Decisions, one scripted case each: when a rule fires, what shadow counts, how slots are reused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from monitor.monitor import StepReadouts
from monitor.request import is_blocked
from monitor.segments import PromptMap
from monitor.types import Action, Mode, Skip
from probes.card import Format
from tests.unit.artifacts import rule
from tests.unit.script import make_case

PROMPT = rule("prompt", when="aggregate: {kind: max}, above: {value: 1.0}")
STREAM = rule("stream", stage="stream", when="aggregate: {kind: max}, above: {value: 1.0}")


def test_a_prompt_is_judged_after_its_last_token(tmp_path: Path) -> None:
    case = make_case(tmp_path, PROMPT)
    case.admit(num_prompt=4)
    assert case.see([0, 9]) == ("allow", "")
    assert case.see([0], start=2) == ("allow", "")
    assert case.see([0], start=3) == ("block", "prompt")


def test_prompt_rules_do_not_read_the_reply_nor_stream_rules_the_prompt(tmp_path: Path) -> None:
    case = make_case(tmp_path, PROMPT, STREAM)
    case.admit(num_prompt=3)
    assert case.see([0, 0, 0, 9]) == ("block", "stream")
    case.admit("b", num_prompt=3)
    assert case.see([0, 9, 0], name="b") == ("block", "prompt")


@pytest.mark.parametrize(("score", "action"), [(1.0, "allow"), (np.nextafter(np.float32(1), np.float32(2)), "block")])
@pytest.mark.parametrize("stage", ["prompt", "stream"])
def test_only_what_is_strictly_greater_fires(tmp_path: Path, stage: str, score: float, action: str) -> None:
    case = make_case(tmp_path, PROMPT if stage == "prompt" else STREAM)
    case.admit(num_prompt=2)
    case.see([0, 0 if stage == "stream" else score])
    assert case.see([score], start=2)[0] == (action)


def test_a_stream_is_judged_at_each_token(tmp_path: Path) -> None:
    case = make_case(tmp_path, STREAM)
    case.admit(num_prompt=2)
    case.see([9, 9])
    assert [case.see([score], start=2 + number)[0] for number, score in enumerate([0, 0.5, 2, 0])] == [
        "allow",
        "allow",
        "block",
        "block",
    ]


@pytest.mark.parametrize("first", ["prompt", "stream"])
def test_of_two_rules_that_fire_at_once_the_first_in_the_file_decides(tmp_path: Path, first: str) -> None:
    """Of a raw prompt, rules of both stages read the same tokens."""
    case = make_case(tmp_path, *((PROMPT, STREAM) if first == "prompt" else (STREAM, PROMPT)))
    case.admit(num_prompt=3, fmt=Format.RAW, prompt=PromptMap.raw(3))
    assert case.see([0, 9, 0]) == ("block", first)


def test_a_response_is_judged_when_it_has_ended_and_shown_as_if_it_had(tmp_path: Path) -> None:
    """An engine is told late, or never, that a stop string or a client has ended a reply."""
    response = rule(
        "end", stage="response", when="aggregate: {kind: mean}, above: {value: 1.0}", action="flag"
    )  # fmt: skip
    case = make_case(tmp_path, response)
    case.admit(num_prompt=2)
    assert case.see([9, 9, 0.5]) == ("allow", "")
    shown = []
    for position, score in enumerate([3, 0.5, 0], start=3):
        assert case.see([score], start=position) == ("allow", "")
        live = case.monitor.get("a")
        assert live is not None
        seen = case.monitor.snapshot([live])
        decided = seen.decided.get("a")
        shown.append((decided.action.action.value, decided.rule) if decided is not None else ("allow", ""))
        assert seen.fired.tolist() == [[decided is not None]]
    assert shown == [("flag", "end"), ("flag", "end"), ("allow", "")]
    assert not case.monitor.take_tally().acted
    case.see([9], start=6)
    ended = case.monitor.finish("a", num_positions=7, sampled=5, aborted=True)
    assert ended is not None
    assert ended.fired.tolist() == [True]
    assert ended.statistics[0] == pytest.approx((0.5 + 3 + 0.5 + 0 + 9) / 5)
    assert ended.request.action.action is Action.FLAG
    assert case.monitor.take_tally().acted == {("end", Action.FLAG, Mode.ENFORCE, "default"): 1}


@pytest.mark.parametrize(("scores", "action"), [([0.5, 3], "block"), ([0.5, 1], "allow")])
def test_a_block_at_the_end_of_a_reply_is_known_at_its_end(tmp_path: Path, scores: list[float], action: str) -> None:
    case = make_case(tmp_path, rule("end", stage="response", when="aggregate: {kind: mean}, above: {value: 1.0}"))
    case.admit(num_prompt=2)
    case.see([0, 0])
    case.see(scores, start=2)
    assert case.state() == ("allow", "")
    ended = case.monitor.finish("a", num_positions=5, sampled=3, aborted=False)
    assert ended is not None
    assert ended.request.action.action.value == action


def test_the_sink_is_not_read(tmp_path: Path) -> None:
    case = make_case(tmp_path, PROMPT, STREAM, skip_first=3)
    case.admit(num_prompt=2)
    assert case.see([9, 9]) == ("allow", "")
    assert case.see([9], start=2) == ("allow", "")
    assert case.see([9], start=3) == ("block", "stream")
    ended = case.monitor.finish("a", num_positions=4, sampled=2, aborted=False)
    assert ended is not None
    assert (ended.coverage.sink, ended.coverage.scored, ended.coverage.final) == (3, 1, 0)


def test_an_action_only_rises(tmp_path: Path) -> None:
    flag = rule("flag", stage="stream", action="flag", when="aggregate: {kind: max}, above: {value: 0.5}")
    case = make_case(tmp_path, STREAM, flag)
    case.admit(num_prompt=1)
    case.see([0])
    assert case.see([0.7], start=1) == ("flag", "flag")
    assert case.see([2], start=2) == ("block", "stream")
    assert case.see([-9], start=3) == ("block", "stream")
    assert is_blocked(case.monitor.get("a"))
    assert not is_blocked(case.monitor.get("nobody"))


def test_shadow_counts_and_does_nothing(tmp_path: Path) -> None:
    shadow = rule("shadow", stage="stream", mode="shadow", when="aggregate: {kind: max}, above: {value: 1.0}")
    case = make_case(tmp_path, shadow)
    case.admit(num_prompt=1)
    case.see([0])
    assert case.see([9], start=1) == ("allow", "")
    assert case.see([9], start=2) == ("allow", "")
    assert case.monitor.take_tally().acted == {("shadow", Action.BLOCK, Mode.SHADOW, "default"): 1}


@pytest.mark.parametrize("on_uncalibrated", ["block", "flag", "allow"])
def test_a_format_without_threshold_follows_the_policy(tmp_path: Path, on_uncalibrated: str) -> None:
    """Nothing fires in it, so the policy decides at admission."""
    case = make_case(tmp_path, PROMPT, policy=f"on_uncalibrated: {on_uncalibrated}", formats=(Format.CHAT,))
    case.admit(num_prompt=2, fmt=Format.RAW)
    expected = (on_uncalibrated, "on_uncalibrated" if on_uncalibrated != "allow" else "")
    assert case.state() == expected
    assert case.see([0, 9]) == expected
    assert case.monitor.take_tally().acted == {("on_uncalibrated", Action(on_uncalibrated), Mode.ENFORCE, "default"): 1}


def test_an_unknown_policy_is_the_first(tmp_path: Path) -> None:
    case = make_case(tmp_path, PROMPT)
    request = case.monitor.admit("a", num_prompt=1, policy="nobody", fmt=Format.CHAT)
    assert case.monitor.policy_of(request).name == "default"


def test_slots_grow_past_the_first_and_are_reused_clean(tmp_path: Path) -> None:
    case = make_case(
        tmp_path, PROMPT, STREAM, rule("mean", stage="stream", when="aggregate: {kind: mean}, above: {value: 5}")
    )
    for number in range(200):
        case.admit(f"r{number}", num_prompt=2)
    slots = {request.slot for number in range(200) if (request := case.monitor.get(f"r{number}")) is not None}
    assert len(slots) == 200
    for number in range(200):
        case.see([0, 9 if number % 2 else 0], name=f"r{number}")
    assert [case.state(f"r{number}")[0] for number in range(4)] == ["allow", "block", "allow", "block"]
    for number in range(200):
        case.see([0.5], start=2, name=f"r{number}")
        ended = case.monitor.finish(f"r{number}", num_positions=3, sampled=1, aborted=False)
        assert ended is not None
        assert ended.statistics[1] == 0.5
    # Whoever comes next has a used slot and nothing of its former owner.
    for number in range(200):
        case.admit(f"s{number}", num_prompt=2)
    again = {request.slot for number in range(200) if (request := case.monitor.get(f"s{number}")) is not None}
    assert again <= set(range(256))
    for number in range(200):
        assert case.see([0, 0.25], name=f"s{number}") == ("allow", "")
        ended = case.monitor.finish(f"s{number}", num_positions=3, sampled=1, aborted=False)
        assert ended is not None
        assert ended.statistics.tolist() == [0.25, -np.inf, -np.inf]
        assert not ended.fired.any()
    assert case.monitor.finish("s0", num_positions=3, sampled=1, aborted=False) is None


def test_one_step_of_256_requests(tmp_path: Path) -> None:
    case = make_case(tmp_path, STREAM)
    names = [f"r{number}" for number in range(256)]
    for name in names:
        case.admit(name, num_prompt=1)
    scores = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    case.monitor.observe(case.script.step([(name, [0], case.script.rows([0])) for name in names]))
    case.monitor.observe(
        case.script.step([(name, [1], case.script.rows([s])) for name, s in zip(names, scores, strict=True)])
    )
    requests = [request for name in names if (request := case.monitor.get(name)) is not None]
    seen = case.monitor.snapshot(requests)
    assert np.array_equal(seen.statistics[:, 0], scores.astype(float))
    assert np.array_equal(seen.fired[:, 0], scores > 1.0)
    assert seen.scored.tolist() == seen.sink.tolist() == [1] * 256
    assert seen.decided.keys() == {name for name, score in zip(names, scores, strict=True) if score > 1.0}
    assert [is_blocked(request) for request in requests] == (scores > 1.0).tolist()
    assert case.monitor.take_tally().acted["stream", Action.BLOCK, Mode.ENFORCE, "default"] == np.count_nonzero(
        scores > 1.0
    )


def test_counts_start_anew_when_they_are_taken(tmp_path: Path) -> None:
    case = make_case(tmp_path, PROMPT)
    case.admit(num_prompt=3)
    case.see([0, 0, 9])
    first, second = case.monitor.take_tally(), case.monitor.take_tally()
    assert (first.scored, first.skipped[Skip.SINK], first.acted.total()) == (2, 1, 1)
    assert (second.scored, second.skipped.total(), second.acted.total()) == (0, 0, 0)


def test_rows_that_do_not_count_are_left_out(tmp_path: Path) -> None:
    """Rejected drafts stand behind the accepted rows; a request may also have none at all."""
    case = make_case(tmp_path, STREAM)
    case.admit(num_prompt=1)
    case.admit("b", num_prompt=1)
    positions = np.array([0, 1, 2, 0])
    readouts = case.script.rows([0, 0, 9, 0])
    case.monitor.observe(StepReadouts(["a", "b"], np.array([2, 1]), np.array([0, 3]), positions, readouts))
    assert case.state() == ("allow", "")
    empty = case.script.rows(np.zeros((0, 1)))
    case.monitor.observe(StepReadouts(["a"], np.array([0]), np.array([0]), np.array([], dtype=np.int64), empty))
    assert case.see([0], start=2) == ("allow", "")
    request = case.monitor.get("a")
    assert request is not None
    assert not request.gaps


def test_another_shape_than_the_bank_is_refused_before_anything_changes(tmp_path: Path) -> None:
    case = make_case(tmp_path, PROMPT)
    case.admit(num_prompt=1)
    step = case.script.step([("a", [0], case.script.rows([9]))])
    for readouts in (step.readouts[:, :-1], step.readouts[:0]):
        with pytest.raises(ValueError, match="readouts have the shape"):
            case.monitor.observe(StepReadouts(step.request_ids, step.counts, step.starts, step.positions, readouts))
    assert case.monitor.take_tally().scored == 0
    assert case.state() == ("allow", "")
