"""``telltale policy simulate`` over a trail on disk: what is counted, in tables and as JSON, and what is refused."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from monitor.audit.record import Chain
from monitor.audit.store import open_store
from monitor.events import Started
from probes.errors import TelltaleError
from serving.cli import app
from serving.deployment import check_policy
from tests.unit.artifacts import make_card, policy_text, rule, saved_artifact, write_policy
from tests.unit.audit_trail import KEY
from tests.unit.test_simulation import MAX, NAMES, WATCHED, serve

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
RECORDED = rule("seen", action="flag", when=f"{MAX}: {{value: 1.0}}")


def policy(folder: Path, *rules: str) -> str:
    for number, name in enumerate(NAMES):
        saved_artifact(folder, make_card(name, skip_first=1), number)
    return str(write_policy(folder, policy_text("\n".join(rules), names=NAMES)).path)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["policy", "simulate", *arguments], env={"COLUMNS": "160"})


@pytest.fixture
def trail(tmp_path: Path) -> str:
    """Four requests, an hour apart, with the highest scores 0.5, 1.5, 2.5 and 3.5."""
    under = check_policy(Path(policy(tmp_path, RECORDED, *WATCHED)))
    url = f"jsonl:///{tmp_path / 'trail'}"
    store, chain = open_store(url, make=True), Chain(KEY)
    records = [chain.add(Started(program="test", time=NOW), None)]
    for number, top in enumerate((0.5, 1.5, 2.5, 3.5)):
        event = serve(under, [(0, 0), (top, 0)], 2)
        records.append(chain.add(event.model_copy(update={"time": NOW + timedelta(hours=number)}), None))
    store.append(records)
    store.close()
    return url


def test_it_says_what_would_have_been_different(tmp_path: Path, trail: str) -> None:
    block = rule("seen", action="block", when=f"{MAX}: {{value: 2.0}}")
    unheard = rule("new", action="flag", when="aggregate: {kind: mean}, above: {value: 2.0}")
    file = policy(tmp_path, block, unheard)
    result = run(file, "--from", trail, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (one,) = found["policies"]
    assert (found["requests"], one["policy"], one["requests"]) == (4, "default", 4)
    by_name = {item["rule"]: item for item in one["rules"]}
    seen = by_name["seen"]
    assert (seen["action"], seen["would_have"], seen["did"], seen["more"], seen["fewer"]) == ("block", 2, 3, 0, 1)
    assert (by_name["new"]["would_have"], by_name["new"]["cannot_be_told"]) == (0, 4)
    assert by_name["new"]["why"] == {"mean of harm at prompt: not_stored": 4}
    table = run(file, "--from", trail)
    assert "new: 4 cannot be told, mean of harm at prompt: not_stored" in table.stdout
    assert "4 requests looked at" in table.stdout


def requests(*arguments: str) -> int:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return int(json.loads(result.stdout)["requests"])


def test_a_period_is_from_its_begin_up_to_its_end(tmp_path: Path, trail: str) -> None:
    file = policy(tmp_path, RECORDED)
    assert requests(file, "--from", trail, "--since", "2026-11-20T13:00") == 3
    assert requests(file, "--from", trail, "--until", "2026-11-20T13:00+00:00") == 1
    assert requests(file, "--from", trail, "--since", "2026-11-20T14:00+01:00", "--until", "2026-11-20T14:30") == 2
    hours = int((datetime.now(UTC) - NOW) / timedelta(hours=1)) if datetime.now(UTC) > NOW else 0
    assert requests(file, "--from", trail, "--since", f"{hours + 2}h") == 4


def test_the_trail_is_that_of_the_policy_file_if_none_is_named(tmp_path: Path, trail: str) -> None:
    file = Path(policy(tmp_path, RECORDED))
    file.write_text(file.read_text() + "audit: {url: 'jsonl:///trail'}\n")
    assert requests(str(file)) == 4


def test_all_requests_are_tried_with_a_policy_that_is_named(tmp_path: Path, trail: str) -> None:
    file = Path(policy(tmp_path, RECORDED))
    file.write_text(file.read_text().replace("name: default", "name: strict"))
    found = json.loads(run(str(file), "--from", trail, "--json").stdout)
    assert (found["policies"], found["without_policy"]) == ([], {"default": 4})
    assert "which this file does not have" in run(str(file), "--from", trail).stdout
    found = json.loads(run(str(file), "--from", trail, "--json", "--policy", "strict").stdout)
    assert [one["requests"] for one in found["policies"]] == [4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--since", "yesterday"], "--since yesterday: is no time"),
        (["--policy", "defalt"], "Did you mean 'default'"),
        (["--until", "2020-01-01"], "holds no decision of that period"),
    ],
)
def test_what_cannot_be_tried_is_told(tmp_path: Path, trail: str, arguments: list[str], message: str) -> None:
    result = run(policy(tmp_path, RECORDED), "--from", trail, *arguments)
    assert isinstance(result.exception, TelltaleError)
    assert message in str(result.exception)
