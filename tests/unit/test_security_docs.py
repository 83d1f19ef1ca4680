"""The threat model names tests that there are, and the whole red team."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text()
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(\w+)`", TEXT)))


def test_every_test_that_is_named_is_there() -> None:
    folders = [ROOT / "tests" / name for name in ("unit", "engine", "services")]
    missing = []
    for file, test in NAMED:
        sources = [(folder / file).read_text() for folder in folders if (folder / file).is_file()]
        if not any(re.search(rf"def {test}\(", source) for source in sources):
            missing.append(f"{file}::{test}")
    assert len(NAMED) > 50
    assert missing == []


def test_every_row_of_a_table_of_attempts_names_a_test() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("|")]
    attempts = [
        row for row in rows if not re.match(r"\| (attempt|who|---|a malicious|a compromised|the \*\*)|\|---", row)
    ]
    assert len(attempts) > 40
    assert [row for row in attempts if "::" not in row] == []


def test_every_attempt_of_the_red_team_is_in_it() -> None:
    files = ("test_red_team.py", "test_red_team_paths.py")
    sources = [(ROOT / "tests" / "engine" / file).read_text() for file in files]
    tried = {test for source in sources for test in re.findall(r"def (test_\w+)\(", source)}
    told = {test for file, test in NAMED if file in files}
    alone = {
        "test_asked_plainly_the_rules_hold_and_the_rest_is_answered",
        "test_every_request_was_signed",
        "test_in_any_role",
        "test_a_response_of_another",
    }
    assert tried - told == alone
