"""``telltale audit`` and ``telltale tail``: what they print, what they change, and their exit codes."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from monitor.audit.checkpoint import CheckpointFile, Checkpoints
from monitor.audit.errors import AuditError
from monitor.audit.key import load_key
from monitor.audit.store import Store, open_store
from monitor.audit.verify import verify
from monitor.events import Erased, Pruned
from serving.cli import app
from tests.unit.artifacts import calibration, make_card, policy_text, rule, saved_artifact
from tests.unit.audit_trail import chain_of, decision
from tests.unit.test_audit_writer import events_of

COUNT = 4


class Site:
    """A policy file with a filled trail beside it."""

    def __init__(self, folder: Path, *, retention: str = "90d") -> None:
        self.folder = folder
        self.policy = folder / "telltale.yaml"
        audit = f"audit: {{checkpoints: sent.jsonl, retention: {retention}}}\n"
        self.policy.write_text(policy_text(rule("stop")) + audit)
        self.key = load_key(folder / "audit.key", make=True)
        old = datetime.now(UTC) - timedelta(days=100)
        past, records = chain_of(2, key=self.key, times=[old, old], tenant="past")
        self.chain, newer = chain_of(COUNT, key=self.key)
        store = self.store(make=True)
        store.append(records)
        store.append(newer)
        store.close()
        self.past = past.writer

    def store(self, *, make: bool = False) -> Store:
        return open_store(f"sqlite:///{self.folder / 'telltale.db'}", make=make)

    def run(self, *arguments: str, site: bool = True) -> Result:
        given = ["--policy", str(self.policy)] if site else []
        return CliRunner().invoke(app, [*arguments, *given])


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_verify_says_that_it_holds(site: Site) -> None:
    Checkpoints(site.chain, CheckpointFile(site.folder / "sent.jsonl")).send()
    result = site.run("audit", "verify")
    assert result.exit_code == 0, result.output
    assert "the trail holds; 10 records in 2 chains, 0 contents erased on record, 1 checkpoints" in result.stdout


def test_verify_names_what_does_not_hold(site: Site) -> None:
    with closing(sqlite3.connect(site.folder / "telltale.db")) as database, database:
        database.execute("UPDATE telltale_audit SET event = replace(event, 'flag', 'slag') WHERE seq = 3")
    result = site.run("audit", "verify")
    assert result.exit_code == 1
    assert f"chain {site.chain.writer[:8]} record 3: it was altered" in result.stdout
    found = json.loads(CliRunner().invoke(app, ["audit", "verify", "--policy", str(site.policy), "--json"]).stdout)
    assert found["holds"] is False
    assert {(item["chain"], item["record"]) for item in found["findings"]} >= {(site.chain.writer, 3)}


def test_verify_takes_keys_from_before(site: Site, tmp_path: Path) -> None:
    (tmp_path / "audit.key").rename(tmp_path / "old.key")
    load_key(tmp_path / "audit.key", make=True)
    assert site.run("audit", "verify").exit_code == 1
    assert site.run("audit", "verify", "--old-key", str(tmp_path / "old.key")).exit_code == 0


def test_a_copy_is_proved_like_the_original(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    result = site.run("audit", "export", "--out", str(out))
    assert result.exit_code == 0
    assert len(list(out.iterdir())) == 2
    arguments = ["audit", "verify", "--url", f"jsonl:///{out}", "--key-file", str(tmp_path / "audit.key")]
    assert "10 records in 2 chains" in CliRunner().invoke(app, arguments).stdout
    (file, *_) = sorted(out.iterdir())
    file.write_bytes(file.read_bytes().replace(b"default", b"defualt", 1))
    assert CliRunner().invoke(app, arguments).exit_code == 1
    assert isinstance(site.run("audit", "export", "--out", str(out)).exception, AuditError)


def test_prune_removes_what_is_old_and_records_it(site: Site) -> None:
    assert site.run("audit", "prune", "--older-than", "200d").exit_code == 0
    assert len(site.store().writers()) == 2
    assert site.run("audit", "prune").exit_code == 0
    store = site.store()
    assert site.past not in store.writers()
    assert [type(event) for event in events_of(store)].count(Pruned) == 1
    assert verify(store, [site.key]).holds
    assert site.run("audit", "prune").exit_code == 0
    assert [type(event) for event in events_of(store)].count(Pruned) == 1
    assert "whole number of days" in str(site.run("audit", "prune", "--older-than", "3h").exception)


@pytest.mark.parametrize(("arguments", "count"), [(("--tenant", "acme"), 2), (("--request", "chatcmpl-1-x"), 2)])
def test_delete_erases_contents_and_nothing_else(site: Site, arguments: tuple[str, str], count: int) -> None:
    before = len(events_of(site.store()))
    assert site.run("audit", "delete", *arguments).exit_code == 0
    store = site.store()
    assert len(events_of(store)) == before + 3
    (erased,) = [event for event in events_of(store) if isinstance(event, Erased)]
    assert len(erased.records) == count
    proof = verify(store, [site.key])
    assert (proof.findings, proof.erased) == ([], count)
    assert site.run("audit", "delete", *arguments).exit_code == 1  # nothing is left of it


def test_delete_wants_one_of_both(site: Site) -> None:
    for arguments in ((), ("--tenant", "a", "--request", "b")):
        assert isinstance(site.run("audit", "delete", *arguments).exception, AuditError)


def test_tail_shows_the_newest_and_goes_on(site: Site) -> None:
    shown = site.run("tail", "--no-follow", "--last", "3").stdout.splitlines()
    assert [line.split()[2] for line in shown] == ["decision", "decision", "stopped"]
    assert "flag  by no-harm  policy default  6/9 scored  fired harm  gaps unseen 1  chatcmpl-2" in shown[0]
    command = [sys.executable, "-m", "serving.cli", "tail", "--last", "1", "--json", "--policy", str(site.policy)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["kind"] == "stopped"  # from here on it follows
        event = decision()
        store = site.store()
        store.append([site.chain.add(event, None)])
        line = process.stdout.readline()
        process.terminate()
    assert json.loads(line)["id"] == str(event.id)


def test_what_is_missing_is_a_usage_error(site: Site, tmp_path: Path) -> None:
    bare = tmp_path / "bare.yaml"
    bare.write_text(policy_text(rule("stop")))
    for arguments, said in (
        (("audit", "verify"), "give --policy FILE"),
        (("audit", "verify", "--policy", str(bare)), "has no 'audit'"),
        (("audit", "verify", "--url", f"sqlite:///{tmp_path}/no.db"), "audit key"),
        (("tail", "--url", f"sqlite:///{tmp_path}/no.db"), "no such file"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "serving.cli", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith("telltale: ")
        assert said in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("audit", "said"),
    [
        ("", "audit: none"),
        ("audit: {text: flagged}\n", "audit: sqlite:///telltale.db, texts flagged, before_release"),
        ("audit: {url: 'postgresql://u:secret@db/x', durability: async}\n", "postgresql://...@db/x, texts none, async"),
    ],
)
def test_check_says_where_events_go(tmp_path: Path, audit: str, said: str) -> None:
    saved_artifact(tmp_path, make_card(calibrations=[calibration()]))
    (tmp_path / "telltale.yaml").write_text(policy_text(rule("stop")) + audit)
    result = CliRunner().invoke(app, ["check", str(tmp_path / "telltale.yaml")])
    assert result.exit_code == 0, result.output
    assert said in " ".join(result.output.split())
    assert "secret" not in result.output
