"""Whatever breaks, a position that was not scored is counted, and the policy's on_gap says what follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.faults import BEFORE, CANARY_FAULTS, FAULTS, HOW, ON_GAP, WHERE
from tests.support.fail_contract import PAGE, page
from tests.support.tiny import TinyModel, save_trigger

pytestmark = pytest.mark.engine

PROMPT, NEW = 20, 6
REASONS = {
    "nan": "not_finite",
    "infinite": "not_finite",
    "no_readouts": "no_readouts",
    "rows_missing": "no_readouts",
    "wrong_width": "monitor_error",
    "monitor_error": "monitor_error",
    "silent_tap": "not_finite",
}
CANARY_REASONS = {
    "corrupted_bank": "wrong_scores",
    "corrupted_bias": "wrong_scores",
    "silent_tap": "not_finite",
    "late": "late",
    "nan": "not_finite",
    "no_readouts": "not_seen",
}
FAULT_ROWS = {
    "nan": "NaN in a readout",
    "infinite": "infinite readout",
    "no_readouts": "step without readouts",
    "rows_missing": "readouts with rows missing",
    "wrong_width": "readouts of another width",
    "monitor_error": "exception in the monitor",
    "silent_tap": "tap that stops firing",
}
"""The faults as docs/coverage.md calls them."""
CANARY_ROWS = {
    "corrupted_bank": "canary: corrupted weights",
    "corrupted_bias": "canary: corrupted bias",
    "silent_tap": "canary: tap that stops firing",
    "late": "canary: late",
    "nan": "canary: NaN",
    "no_readouts": "canary: without readouts",
}
POLICY = """\
version: "1"
detectors:
  - artifact: known.safetensors
canary: {every: 24h, deadline: 2s}
policies:
  - name: default
    on_gap: block
    on_uncalibrated: flag
    expose: scores
    rules:
      - {name: no-trigger-prompt, when: {detector: trigger, stage: prompt}, do: {action: block}, mode: enforce}
      - {name: no-trigger-stream, when: {detector: trigger, stage: stream}, do: {action: block}, mode: enforce}
"""


@pytest.fixture(scope="module")
def found(tiny: TinyModel, folder: Path) -> dict[str, Any]:
    save_trigger(folder / "known.safetensors", tiny.path, canary=True)
    (folder / "known.yaml").write_text(POLICY)
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.faults", str(tiny.path), str(folder / "known.yaml"), str(tiny.trigger)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("OUTCOMES "))
    everything: dict[str, Any] = json.loads(line.removeprefix("OUTCOMES "))
    return everything


@pytest.fixture(scope="module")
def outcomes(found: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    requests: dict[str, dict[str, dict[str, Any]]] = found["requests"]
    return requests


@pytest.fixture(scope="module")
def contract(found: dict[str, Any]) -> dict[str, Any]:
    outcomes: dict[str, Any] = found["contract"]
    return outcomes


def skipped_beside(outcome: dict[str, Any]) -> dict[str, int]:
    return {reason: count for reason, count in outcome["skipped"].items() if reason not in {"sink", "final"}}


@pytest.mark.parametrize("action", ON_GAP)
def test_without_a_fault_nothing_happens(outcomes: dict, action: str) -> None:
    outcome = outcomes["none"][action]
    assert outcome["action"] == "allow"
    assert outcome["finish"] == "length"
    assert outcome["tokens"] == NEW
    assert outcome["skipped"] == {"sink": 1, "final": 1}
    assert outcome["scored"] == PROMPT + NEW - 2


@pytest.mark.covers(FAULT_ROWS, "gap counted, on_gap followed")
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "none"])
class TestAFault:
    def test_is_counted_by_its_reason_and_every_position_is_accounted_for(self, outcomes: dict, fault: str) -> None:
        for outcome in outcomes[fault].values():
            assert set(skipped_beside(outcome)) == {REASONS[fault]}
            assert outcome["scored"] + sum(outcome["skipped"].values()) == PROMPT + outcome["tokens"]

    def test_blocks_where_the_policy_says_block(self, outcomes: dict, fault: str) -> None:
        outcome = outcomes[fault]["block"]
        assert outcome["finish"] == "content_filter"
        assert outcome["rule"] == "on_gap"
        assert outcome["text_is_refusal"]
        assert outcome["tokens"] == 0

    def test_flags_where_the_policy_says_flag(self, outcomes: dict, fault: str) -> None:
        outcome = outcomes[fault]["flag"]
        assert (outcome["action"], outcome["rule"], outcome["finish"]) == ("flag", "on_gap", "length")
        assert outcome["tokens"] == NEW

    def test_only_counts_where_the_policy_says_allow(self, outcomes: dict, fault: str) -> None:
        outcome = outcomes[fault]["allow"]
        assert (outcome["action"], outcome["rule"], outcome["finish"]) == ("allow", None, "length")
        assert outcome["tokens"] == NEW


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("where", WHERE)
class TestTheContract:
    """The same faults by where they begin and how the reply is asked for."""

    def test_without_a_fault_the_reply_comes_whole(self, contract: dict[str, Any], where: str, how: str) -> None:
        for outcome in contract["none"][where][how].values():
            assert (outcome["action"], outcome["finish"], outcome["tokens"]) == ("allow", "length", NEW)
            assert outcome["shown"]
            assert not outcome["refusal"]

    @pytest.mark.parametrize("fault", FAULT_ROWS)
    def test_block_shows_nothing_that_was_not_scored(
        self, contract: dict[str, Any], where: str, how: str, fault: str
    ) -> None:
        outcome = contract[fault][where][how]["block"]
        assert (outcome["action"], outcome["rule"], outcome["finish"]) == ("block", "on_gap", "content_filter")
        assert outcome["refusal"]
        seen = BEFORE if where == "stream" else 0
        assert outcome["tokens"] <= seen
        assert outcome["shown"] == (where == "stream" and how == "streamed")

    @pytest.mark.parametrize("fault", FAULT_ROWS)
    def test_flag_and_allow_show_the_reply_and_count(
        self, contract: dict[str, Any], where: str, how: str, fault: str
    ) -> None:
        for action in ("flag", "allow"):
            outcome = contract[fault][where][how][action]
            assert (outcome["action"], outcome["finish"], outcome["tokens"]) == (action, "length", NEW)
            assert not outcome["refusal"]
            assert set(skipped_beside(outcome)) == {REASONS[fault]}
            assert outcome["scored"] + sum(outcome["skipped"].values()) == PROMPT + NEW


def test_the_page_says_what_the_engine_does(contract: dict[str, Any]) -> None:
    said = page(contract, FAULT_ROWS, REASONS)
    if os.environ.get("WRITE_FAIL_CONTRACT"):
        PAGE.write_text(said)
    assert PAGE.read_text() == said


@pytest.mark.covers("exception in the monitor", "isolation")
def test_an_exception_in_the_monitor_is_the_fault_of_one_request_alone(found: dict[str, Any]) -> None:
    innocent, guilty = found["pair"]
    assert (innocent["action"], innocent["tokens"], skipped_beside(innocent)) == ("allow", NEW, {})
    assert innocent["scored"] == PROMPT + NEW - 2
    assert (guilty["action"], guilty["rule"], guilty["tokens"]) == ("block", "on_gap", 0)
    assert set(skipped_beside(guilty)) == {"monitor_error"}


def test_what_lies_on_the_device_is_the_bank(found: dict[str, Any]) -> None:
    assert found["resident"] == ""


@pytest.mark.covers("canary requests", "isolation")
def test_a_canary_passes_and_is_not_counted(found: dict[str, Any]) -> None:
    outcome = found["canaries"]["none"]
    assert outcome["canary"] == {"failure": None, "passed": True, "waiting": False, "deviation": 0.0}
    assert outcome["tally_unchanged"]
    assert (outcome["allow"]["action"], skipped_beside(outcome["allow"])) == ("allow", {})


@pytest.mark.parametrize("fault", CANARY_FAULTS)
class TestAFailingCanary:
    @pytest.mark.covers(CANARY_ROWS, "noticed")
    def test_says_why(self, found: dict[str, Any], fault: str) -> None:
        reason, detail = found["canaries"][fault]["canary"]["failure"]
        assert reason == CANARY_REASONS[fault]
        if reason == "wrong_scores":
            assert "'trigger' at position" in detail
            assert "expected" in detail
            assert "found" in detail

    @pytest.mark.covers("weights on the device that are not the bank's", "noticed")
    def test_weights_that_are_not_the_banks_are_refused_at_the_handshake(
        self, found: dict[str, Any], fault: str
    ) -> None:
        refusal = found["canaries"][fault]["resident"]
        assert ("worker 0 multiplies at resid_post.0" in refusal) == fault.startswith("corrupted")

    @pytest.mark.covers(CANARY_ROWS, "gap counted, on_gap followed")
    @pytest.mark.parametrize("action", ON_GAP)
    def test_makes_every_position_a_gap_that_follows_on_gap(
        self, found: dict[str, Any], fault: str, action: str
    ) -> None:
        outcome = found["canaries"][fault][action]
        tokens = 0 if action == "block" else NEW
        assert outcome["tokens"] == tokens
        assert outcome["action"] == action
        assert outcome["rule"] == (None if action == "allow" else "on_gap")
        assert outcome["scored"] == 0
        assert set(skipped_beside(outcome)) == {"canary"}
        assert sum(outcome["skipped"].values()) == PROMPT + tokens

    def test_is_over_when_one_passes(self, found: dict[str, Any], fault: str) -> None:
        assert found["canaries"][fault]["again"]["failure"] is None
        after = found["canaries"][fault]["after"]
        assert (after["action"], after["tokens"], skipped_beside(after)) == ("allow", NEW, {})
        assert after["scored"] == PROMPT + NEW - 2
