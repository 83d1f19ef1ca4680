"""``telltale top``: what it shows is what the server counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console
from typer.testing import CliRunner

from monitor.policy import Plan
from serving.cli import app
from serving.commands.top import render
from serving.scrape import Scrape, ScrapeError, parse_scrape, scrape
from tests.support.server import free_port
from tests.unit.artifacts import make_card, plan_of, policy_text, rule, unit_artifact
from tests.unit.test_exporter import Run

RULES = "\n".join(
    [
        rule("stop", when="aggregate: {kind: max}, above: {value: 1.0}"),
        rule("look", stage="stream", action="flag", mode="shadow", when="aggregate: {kind: max}, above: {value: 1.0}"),
    ]
)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    artifacts = {name: unit_artifact(make_card(name), number) for number, name in enumerate(("harm", "watched"))}
    return plan_of(tmp_path, policy_text(RULES, names=list(artifacts)), artifacts)


def page(run: Run) -> bytes:
    return generate_latest(run.registry)


def shown(now: Scrape, before: Scrape | None = None) -> list[list[str]]:
    """The words of each line."""
    console = Console(width=160)
    with console.capture() as capture:
        console.print(render(now, before))
    return [line.replace("│", " ").replace("┃", " ").split() for line in capture.get().splitlines()]


@contextmanager
def answering(body: bytes, key: str | None = None) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            refused = key is not None and self.headers.get("authorization") != f"Bearer {key}"
            self.send_response(401 if refused else 200)
            self.end_headers()
            self.wfile.write(b"" if refused else body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_tables_say_what_was_counted(plan: Plan) -> None:
    run = Run(plan)
    run.exporter.canary_passed(0.5)
    for number in range(3):
        run.request(f"fine-{number}", [0.0, 0.5], [0.5, 0.5])
    run.request("bad", [0.0, 2.5], [])
    run.request("late", [0.0, 0.5], [2.0, 0.5])
    lines = shown(parse_scrape(page(run).decode()))
    assert lines[0][:3] == ["ready;", "canary", "passes,"]
    assert lines[1][1] == "100.0000%:"
    assert "block 1" in " ".join(lines[2])
    assert ["harm", "prompt", "max", "all", "5", "1", "20.00%", "1"] in lines
    assert ["stop", "block", "enforce", "default", "1", "20.00%"] in lines
    assert ["look", "would", "flag", "shadow", "default", "1", "20.00%"] in lines
    assert ["oncall", "1", "0", "0", "0"] in lines


def test_rates_are_those_since_the_reading_before(plan: Plan) -> None:
    run = Run(plan)
    run.exporter.canary_passed(0.5)
    run.request("bad", [0.0, 2.5], [])
    before = parse_scrape(page(run).decode())
    for number in range(4):
        run.request(f"fine-{number}", [0.0, 0.5], [0.5, 0.5])
    now = replace(parse_scrape(page(run).decode()), at=before.at + 2.0)
    lines = shown(now, before)
    assert "2.0 requests/s" in " ".join(lines[2])
    (prompt,) = [line for line in lines if line[:2] == ["harm", "prompt"]]
    assert prompt[4:7] == ["5", "1", "0.00%"]


def test_a_gap_and_a_failing_canary_are_seen(plan: Plan) -> None:
    run = Run(plan)
    run.exporter.not_ready()
    run.request("broken", [0.0, 9.0], [float("nan"), 9.0], broken=True)
    lines = shown(parse_scrape(page(run).decode()))
    assert lines[0][:5] == ["NOT", "READY;", "canary", "FAILS,", "last"]
    assert lines[1][1] != "100.0000%:"


def test_once_prints_and_leaves(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(plan)
    run.exporter.canary_passed(0.5)
    monkeypatch.setenv("MY_KEY", "secret")
    with answering(page(run), key="secret") as url:
        result = CliRunner().invoke(app, ["top", "--once", "--url", url, "--key-env", "MY_KEY"], env={"COLUMNS": "160"})
        assert result.exit_code == 0, result.output
        with pytest.raises(ScrapeError, match="asks for a key"):
            scrape(url, None)
    assert "ready; canary passes" in result.output
    assert "secret" not in result.output


def test_what_is_no_server_of_ours_is_told() -> None:
    with pytest.raises(ScrapeError, match="does not answer"):
        scrape(f"http://127.0.0.1:{free_port()}", None)
    with answering(generate_latest(CollectorRegistry())) as url, pytest.raises(ScrapeError, match="no metrics of"):
        scrape(url, None)
