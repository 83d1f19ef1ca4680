"""Decisions, one scripted case each: when a rule fires, what a gap does, what shadow counts, how slots are reused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from monitor.monitor import Monitor, StepReadouts, is_blocked
from monitor.policy import Plan
from monitor.types import Action, ActionCode, Gap, Mode, Skip
from probes.card import Format
from tests.unit.artifacts import calibration, make_card, plan_of, policy_text, rule, unit_artifact
from tests.unit.script import Script

PROMPT = rule("prompt", when="aggregate: {kind: max}, above: {value: 1.0}")
STREAM = rule("stream", stage="stream", when="aggregate: {kind: max}, above: {value: 1.0}")


class Case:
    """A monitor with one linear detector and its script."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.monitor = Monitor(plan)
        self.script = Script(plan)

    def admit(self, name: str = "a", *, num_prompt: int = 3, fmt: Format = Format.CHAT) -> None:
        self.monitor.admit(name, num_prompt=num_prompt, policy=None, fmt=fmt)

    def see(self, scores: list[float], start: int = 0, name: str = "a") -> tuple[str, str]:
        """Feed rows; the action and its rule after them."""
        rows = self.script.rows(scores)
        self.monitor.observe(self.script.step([(name, range(start, start + len(scores)), rows)]))
        return self.state(name)

    def state(self, name: str = "a") -> tuple[str, str]:
        request = self.monitor.get(name)
        assert request is not None
        return request.action.action.value, request.rule


def make_case(folder: Path, *rules: str, policy: str = "", skip_first: int = 1, formats: tuple[Format, ...] = ()) -> Case:
    card = make_card(skip_first=skip_first, formats=formats or tuple(Format), calibrations=[calibration()])
    return Case(plan_of(folder, policy_text("\n".join(rules), policy=policy), {"harm": unit_artifact(card)}))


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


def test_the_sink_is_not_read(tmp_path: Path) -> None:
    case = make_case(tmp_path, PROMPT, STREAM, skip_first=3)
    case.admit(num_prompt=2)
    assert case.see([9, 9]) == ("allow", "")
    assert case.see([9], start=2) == ("allow", "")
    assert case.see([9], start=3) == ("block", "stream")
    ended = case.monitor.finish("a", num_positions=4, sampled=2, aborted=False)
    assert ended is not None
    assert (ended.coverage.sink, ended.coverage.scored, ended.coverage.final) == (3, 1, 0)


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
    assert case.monitor.take_tally().acted == {("on_gap", Action(on_gap), Mode.ENFORCE): 1}


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


def test_a_jump_in_positions_is_a_gap(tmp_path: Path) -> None:
    case = make_case(tmp_path, STREAM, policy="on_gap: block")
    case.admit(num_prompt=3)
    case.see([0, 0, 0])
    assert case.see([0], start=5) == ("block", "on_gap")
    request = case.monitor.get("a")
    assert request is not None
    assert request.gaps == {Gap.UNSEEN: 2}


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


def test_what_never_came_is_a_gap_at_the_end(tmp_path: Path) -> None:
    case = make_case(tmp_path, STREAM, policy="on_gap: flag")
    case.admit(num_prompt=3)
    case.see([0, 0, 0])
    ended = case.monitor.finish("a", num_positions=7, sampled=4, aborted=False)
    assert ended is not None
    assert ended.coverage.skipped() == {"sink": 1, "final": 1, "unseen": 3}
    assert ended.request.action is ActionCode.FLAG
    assert case.monitor.take_tally().gaps == {Gap.UNSEEN: 3}


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
    assert case.monitor.take_tally().acted == {("shadow", Action.BLOCK, Mode.SHADOW): 1}


@pytest.mark.parametrize("on_uncalibrated", ["block", "flag", "allow"])
def test_a_format_without_threshold_follows_the_policy(tmp_path: Path, on_uncalibrated: str) -> None:
    """Nothing fires in it, so the policy decides at admission."""
    case = make_case(tmp_path, PROMPT, policy=f"on_uncalibrated: {on_uncalibrated}", formats=(Format.CHAT,))
    case.admit(num_prompt=2, fmt=Format.RAW)
    expected = (on_uncalibrated, "on_uncalibrated" if on_uncalibrated != "allow" else "")
    assert case.state() == expected
    assert case.see([0, 9]) == expected
    assert case.monitor.take_tally().acted == {("on_uncalibrated", Action(on_uncalibrated), Mode.ENFORCE): 1}


def test_an_unknown_policy_is_the_first(tmp_path: Path) -> None:
    case = make_case(tmp_path, PROMPT)
    request = case.monitor.admit("a", num_prompt=1, policy="nobody", fmt=Format.CHAT)
    assert case.monitor.policy_of(request).name == "default"


def test_slots_grow_past_the_first_and_are_reused_clean(tmp_path: Path) -> None:
    case = make_case(tmp_path, PROMPT, STREAM, rule("mean", stage="stream", when="aggregate: {kind: mean}, above: {value: 5}"))
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
    case.monitor.observe(case.script.step([(name, [1], case.script.rows([s])) for name, s in zip(names, scores, strict=True)]))
    requests = [request for name in names if (request := case.monitor.get(name)) is not None]
    scored, sink, statistics, fired = case.monitor.snapshot(requests)
    assert np.array_equal(statistics[:, 0], scores.astype(float))
    assert np.array_equal(fired[:, 0], scores > 1.0)
    assert scored.tolist() == sink.tolist() == [1] * 256
    assert [is_blocked(request) for request in requests] == (scores > 1.0).tolist()
    assert case.monitor.take_tally().acted["stream", Action.BLOCK, Mode.ENFORCE] == np.count_nonzero(scores > 1.0)


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
