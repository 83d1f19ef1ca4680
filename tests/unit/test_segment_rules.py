"""Rules on the segments of a prompt, and streams that begin before the first generated token: one case each."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor.check import Check
from monitor.segments import PromptMap, Run, role_mask, runs_of
from monitor.types import PromptEvent, Role
from monitor.yaml_file import PolicyError
from probes.card import Format
from tests.unit.artifacts import calibration, make_card, plan_of, policy_text, rule, unit_artifact
from tests.unit.script import Case, make_case

STREAM = rule("stream", stage="stream", when="aggregate: {kind: max}, above: {value: 1.0}")
TOOL = rule("tool", when="segments: [tool], aggregate: {kind: max}, above: {value: 1.0}")
USER = rule("user", when="segments: [user], aggregate: {kind: max}, above: {value: 1.0}")
EVERYBODY = rule("everybody", when="aggregate: {kind: max}, above: {value: 1.0}", action="flag")


def prompt(*runs: tuple[Role, int], stream_from: int | None = None) -> PromptMap:
    length = sum(count for _, count in runs)
    return PromptMap(tuple(Run(*run) for run in runs), length if stream_from is None else stream_from)


CHAT = prompt((Role.TEMPLATE, 2), (Role.USER, 3), (Role.TEMPLATE, 1), (Role.TOOL, 2), (Role.TEMPLATE, 1))


def statistic(case: Case, number: int = 0, name: str = "a") -> float:
    request = case.monitor.get(name)
    assert request is not None
    return float(case.monitor.snapshot([request]).statistics[0, number])


def message_of(folder: Path, rules: str) -> str:
    with pytest.raises(PolicyError) as caught:
        plan_of(folder, policy_text(rules), {"harm": unit_artifact(make_card(calibrations=[calibration()]))})
    return str(caught.value)


def only_check(folder: Path, when: str, stage: str = "prompt") -> Check:
    when = f"{when}, aggregate: {{kind: max}}, above: {{value: 1.0}}"
    plan = plan_of(folder, policy_text(rule("r", stage=stage, when=when)), {"harm": unit_artifact(make_card())})
    (check,) = plan.checks
    return check


class TestThePolicyFile:
    def test_segments_are_kept_in_one_order(self, tmp_path: Path) -> None:
        assert only_check(tmp_path, "segments: [tool, user]").segments == (Role.USER, Role.TOOL)
        assert only_check(tmp_path, "segments: [user, tool]").segments == (Role.USER, Role.TOOL)

    def test_rules_that_read_alike_share_one_check(self, tmp_path: Path) -> None:
        again = TOOL.replace("name: tool", "name: again")
        assert len(make_case(tmp_path, TOOL, again, USER, EVERYBODY).plan.checks) == 3

    def test_a_reply_is_one_segment(self, tmp_path: Path) -> None:
        assert only_check(tmp_path, "segments: [assistant]", "stream").segments is None
        assert only_check(tmp_path, "segments: [tool, assistant]", "stream").segments is None

    @pytest.mark.parametrize(
        ("segments", "stage", "told"),
        [
            ("[]", "prompt", "segments"),
            ("[tools]", "prompt", "segments"),
            ("[user, tool, user]", "prompt", "names 'user' twice"),
            ("tool", "prompt", "segments"),
            ("[user, tool]", "stream", "all of it counts as 'assistant'"),
        ],
    )
    def test_what_cannot_be_read_is_refused(self, tmp_path: Path, segments: str, stage: str, told: str) -> None:
        text = rule("r", stage=stage, when=f"segments: {segments}, aggregate: {{kind: max}}, above: {{value: 1}}")
        message = message_of(tmp_path, text)
        assert told in message
        assert "telltale.yaml:" in message

    def test_the_digest_tells_segments_apart(self, tmp_path: Path) -> None:
        digests = {make_case(tmp_path, text).plan.digest for text in (TOOL, TOOL.replace("tool]", "user]"))}
        assert len(digests) == 2


class TestSegments:
    @pytest.mark.parametrize(
        ("at", "decided"),
        [(0, "allow"), (2, "user"), (4, "user"), (5, "everybody"), (6, "tool"), (7, "tool"), (8, "everybody")],
    )
    def test_a_rule_reads_the_tokens_of_its_roles(self, tmp_path: Path, at: int, decided: str) -> None:
        case = make_case(tmp_path, TOOL, USER, EVERYBODY)
        case.admit(num_prompt=9, prompt=CHAT)
        scores = np.zeros(9)
        scores[at] = 2.0
        action, name = case.see(scores.tolist())
        assert (name or action) == decided

    def test_what_is_not_in_the_request_has_no_statistic(self, tmp_path: Path) -> None:
        case = make_case(tmp_path, TOOL)
        case.admit(num_prompt=3)
        assert case.see([0, 9, 9, 9]) == ("allow", "")
        assert statistic(case) == -np.inf
        ended = case.monitor.finish("a", num_positions=5, sampled=2, aborted=False)
        assert ended is not None
        assert (ended.coverage.positions, ended.coverage.scored) == (5, 3)

    def test_a_window_steps_over_what_others_wrote(self, tmp_path: Path) -> None:
        when = "segments: [user], aggregate: {kind: rolling, window: 3}, above: {value: 5.0}"
        case = make_case(tmp_path, rule("window", when=when))
        case.admit(num_prompt=7, prompt=prompt((Role.TEMPLATE, 1), (Role.USER, 1), (Role.TOOL, 3), (Role.USER, 2)))
        case.see([0, 3, 90, 90, 90, 6, 9])
        assert statistic(case) == 6.0

    def test_the_sink_is_not_read_whoever_wrote_it(self, tmp_path: Path) -> None:
        case = make_case(tmp_path, USER, skip_first=2)
        case.admit(num_prompt=3, prompt=prompt((Role.USER, 3)))
        assert case.see([9, 9, 0]) == ("allow", "")

    @pytest.mark.covers("trusted data forged or changed", "kept out")
    @pytest.mark.parametrize("known", [None, PromptMap.unknown(stream_from=9), prompt((Role.USER, 8), stream_from=9)])
    def test_without_a_map_of_this_prompt_every_rule_reads_everything(
        self, tmp_path: Path, known: PromptMap | None
    ) -> None:
        """A tool's text that broke the map would otherwise pass the rules on tools."""
        case = make_case(tmp_path, TOOL)
        case.monitor.admit("a", num_prompt=9, policy=None, fmt=Format.CHAT, prompt=known)
        assert case.see([0, 0, 0, 9, 0, 0, 0, 0, 0]) == ("block", "tool")


class TestTheTrailingSegment:
    @pytest.mark.covers(["prefilled assistant text", "chunked prefill"], "verdict the same")
    @pytest.mark.parametrize("chunk", [1, 2, 3, 4, 6])
    def test_a_prefilled_reply_is_judged_before_the_first_token(self, tmp_path: Path, chunk: int) -> None:
        case = make_case(tmp_path, STREAM)
        case.admit(num_prompt=6, prompt=prompt((Role.USER, 4), (Role.ASSISTANT, 2), stream_from=4))
        scores = [0.0, 9.0, 0.0, 9.0, 2.0, 0.5]
        states = [case.see(scores[at : at + chunk], start=at) for at in range(0, 6, chunk)]
        assert states[-1] == ("block", "stream")
        assert all(state == ("allow", "") for state in states[:-1])
        assert statistic(case) == 2.0

    @pytest.mark.covers("raw prompts", "verdict the same")
    def test_of_a_raw_prompt_all_is_read_but_the_sink(self, tmp_path: Path) -> None:
        case = make_case(tmp_path, STREAM)
        case.admit(num_prompt=3, prompt=PromptMap.raw(3), fmt=Format.RAW)
        assert case.see([9, 0, 0.75]) == ("allow", "")
        assert statistic(case) == 0.75
        assert case.see([0.5], start=3) == ("allow", "")
        case.admit("b", num_prompt=3, prompt=PromptMap.raw(3), fmt=Format.RAW)
        assert case.see([0, 2, 0], name="b") == ("block", "stream")

    @pytest.mark.covers("chunked prefill", "verdict the same")
    @pytest.mark.parametrize("chunk", [1, 2, 5])
    @pytest.mark.parametrize("order", [(EVERYBODY, STREAM), (STREAM, EVERYBODY.replace("flag", "block"))])
    def test_the_rule_that_decides_does_not_depend_on_chunks(
        self, tmp_path: Path, chunk: int, order: tuple[str, str]
    ) -> None:
        case = make_case(tmp_path, *order)
        case.admit(num_prompt=5, prompt=PromptMap.raw(5), fmt=Format.RAW)
        scores = [0.0, 9.0, 0.0, 0.0, 0.0]
        states = [case.see(scores[at : at + chunk], start=at) for at in range(0, 5, chunk)]
        assert states[-1] == ("block", "stream")

    @pytest.mark.covers("one-token requests", "statistics equal batch")
    def test_one_token_at_a_time_is_the_same_statistic_as_one_reply(self, tmp_path: Path) -> None:
        """A client that sends the reply back as prompt, token by token, is judged on the same numbers."""
        ema = rule("ema", stage="stream", when="aggregate: {kind: ema, alpha: 0.3}, above: {value: 99}")
        case = make_case(tmp_path, ema)
        scores = np.random.default_rng(0).standard_normal(12).tolist()
        case.admit("whole", num_prompt=2, prompt=PromptMap.raw(2), fmt=Format.RAW)
        case.see(scores[:2], name="whole")
        for at in range(2, 12):
            case.see([scores[at]], start=at, name="whole")
            case.admit(f"turn {at}", num_prompt=at + 1, prompt=PromptMap.raw(at + 1), fmt=Format.RAW)
            case.see(scores[: at + 1], name=f"turn {at}")
            assert statistic(case, name=f"turn {at}") == pytest.approx(statistic(case, name="whole"), abs=1e-9)

    def test_a_start_behind_the_prompt_is_its_end(self, tmp_path: Path) -> None:
        case = make_case(tmp_path, STREAM)
        case.admit(num_prompt=2, prompt=prompt((Role.USER, 2), stream_from=5))
        assert case.see([0, 0, 2]) == ("block", "stream")


@pytest.mark.covers("trusted data forged or changed", "noticed")
def test_unsigned_requests_and_events_are_counted(tmp_path: Path) -> None:
    case = make_case(tmp_path, STREAM)
    case.monitor.admit("a", num_prompt=2, policy=None, fmt=Format.RAW)
    case.admit("b", num_prompt=2, prompt=PromptMap(None, 2, (PromptEvent.SPECIAL_TOKEN_IN_CONTENT,)))
    tally = case.monitor.take_tally()
    assert tally.unsigned == 1
    assert tally.events == {PromptEvent.SPECIAL_TOKEN_IN_CONTENT: 1}
    # Nobody said where its reply begins: from the first position on.
    assert case.see([0, 2]) == ("block", "stream")
    assert case.monitor.take_tally().unsigned == 0


@given(codes=st.lists(st.integers(0, len(Role) - 1), max_size=40))
def test_runs_are_the_codes(codes: list[int]) -> None:
    array = np.array(codes, dtype=np.uint8)
    runs = runs_of(array)
    found = PromptMap(runs, 0).codes(len(codes))
    assert found is not None
    assert found.tolist() == codes
    assert all(run.length > 0 for run in runs)
    assert all(left.role is not right.role for left, right in pairwise(runs))
    assert PromptMap(runs, 0).codes(len(codes) + 1) is None


def test_a_mask_is_true_at_its_roles() -> None:
    assert np.flatnonzero(role_mask([Role.TOOL, Role.USER])).tolist() == sorted([Role.USER.code, Role.TOOL.code])
