"""Whatever breaks, a position that was not scored is counted, and the policy's on_gap says what follows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.faults import FAULTS, ON_GAP
from tests.support.tiny import TinyModel

pytestmark = pytest.mark.engine

PROMPT, NEW = 20, 6
REASONS = {
    "nan": "not_finite",
    "infinite": "not_finite",
    "no_readouts": "no_readouts",
    "rows_missing": "no_readouts",
    "wrong_width": "monitor_error",
    "monitor_error": "monitor_error",
}


@pytest.fixture(scope="module")
def outcomes(tiny: TinyModel, folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.faults", str(tiny.path), str(folder / "guarded.yaml")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("OUTCOMES "))
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(line.removeprefix("OUTCOMES "))
    return found


@pytest.mark.parametrize("action", ON_GAP)
def test_without_a_fault_nothing_happens(outcomes: dict, action: str) -> None:
    outcome = outcomes["none"][action]
    assert outcome["action"] == "allow"
    assert outcome["finish"] == "length"
    assert outcome["tokens"] == NEW
    assert outcome["skipped"] == {"sink": 1, "final": 1}
    assert outcome["scored"] == PROMPT + NEW - 2


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "none"])
class TestAFault:
    def test_is_counted_by_its_reason_and_every_position_is_accounted_for(self, outcomes: dict, fault: str) -> None:
        for outcome in outcomes[fault].values():
            gaps = {reason: count for reason, count in outcome["skipped"].items() if reason not in {"sink", "final"}}
            assert set(gaps) == {REASONS[fault]}
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
