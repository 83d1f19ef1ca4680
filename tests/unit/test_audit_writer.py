"""The audit writer: what it acknowledged survives a kill, a full queue does as it was told, an outage loses nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from monitor.audit.checkpoint import CheckpointFile, read_checkpoints
from monitor.audit.errors import AuditStoreError
from monitor.audit.jsonl import JsonlStore
from monitor.audit.metrics import AuditMetrics
from monitor.audit.record import AuditRecord
from monitor.audit.settings import AuditSettings
from monitor.audit.store import Store, open_store
from monitor.audit.verify import verify
from monitor.audit.writer import AuditWriter
from monitor.events import Decision, Dropped, Event, Pruned, Started, Stopped
from tests.unit.audit_trail import KEY, SCHEMES, Watch, chain_of, content, decision, settings_of

ACKNOWLEDGED = 300


class DiskThatFills(JsonlStore):
    """A store on a disk that is full for a while: what it writes then is torn, and an error."""

    full = False

    def append(self, records: Sequence[AuditRecord]) -> None:
        if not self.full:
            super().append(records)
            return
        path = self._path(records[0].writer)
        with path.open("ab") as file:
            file.write(b'{"seq":')
        raise AuditStoreError(f"audit store {path}: no space left on device")


def events_of(store: Store) -> list[Event]:
    return [stored.event for writer in store.writers() for stored in store.read(writer)]


def new_writer(settings: AuditSettings, watch: Watch, **more: object) -> AuditWriter:
    writer = AuditWriter(open_store(settings.url, make=True), KEY, settings, watch, **more)  # type: ignore[arg-type]
    writer.start(Started(program="test"))
    return writer


def failing_writer(folder: Path, watch: Watch, **changes: object) -> tuple[AuditWriter, DiskThatFills]:
    settings = settings_of("jsonl", folder, **changes)
    store = DiskThatFills.open(settings.url, durable=True, make=True)
    writer = AuditWriter(store, KEY, settings, watch)
    writer.start(Started(program="test"))
    store.full = True
    return writer, store


def until(condition: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def killed_under_load(scheme: str, url: str, folder: Path) -> set[str]:
    """Run a writer, kill it with SIGKILL in the middle; the ids that it had acknowledged."""
    command = [sys.executable, "-m", "tests.unit.audit_load", scheme, url, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(ACKNOWLEDGED)]
        process.kill()
        said += process.stdout.readlines()
    assert process.returncode == -9
    return {line.decode().strip() for line in said if line.endswith(b"\n")}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_killed_writer_loses_nothing_that_it_acknowledged(scheme: str, tmp_path: Path) -> None:
    acknowledged = killed_under_load(scheme, "", tmp_path)
    assert len(acknowledged) >= ACKNOWLEDGED
    # The next process, as after a restart, refers to the chain that was cut off.
    settings = settings_of(scheme, tmp_path)
    assert new_writer(settings, Watch()).close()
    store = open_store(settings.url)
    events = events_of(store)
    assert acknowledged <= {str(event.id) for event in events}
    assert [type(event) for event in events].count(Stopped) == 1
    proof = verify(store, [KEY])
    assert proof.findings == []
    assert len(proof.records) == 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_ticket_is_done_when_its_record_is_stored(scheme: str, tmp_path: Path) -> None:
    settings, watch = settings_of(scheme, tmp_path), Watch()
    writer, other = new_writer(settings, watch), open_store(settings.url)
    for number in range(5):
        event = decision()
        ticket = writer.submit(event, lambda number=number: content(number))  # type: ignore[misc]
        assert ticket is not None
        ticket.result(timeout=10)
        assert event.id in {found.id for found in events_of(other)}
    assert writer.close()
    assert watch.kinds == ["started", *["decision"] * 5]


def test_async_makes_nobody_wait_and_writes_all_the_same(tmp_path: Path) -> None:
    settings = settings_of("sqlite", tmp_path, durability="async")
    writer = new_writer(settings, Watch())
    assert [writer.submit(decision()) for _ in range(100)] == [None] * 100
    assert writer.close()
    assert [type(event) for event in events_of(open_store(settings.url))] == [Started, *[Decision] * 100, Stopped]


def test_many_events_share_a_commit(tmp_path: Path) -> None:
    watch = Watch()
    writer, store = failing_writer(tmp_path, watch)
    tickets = [writer.submit(decision()) for _ in range(200)]
    until(lambda: watch.failures)
    commits = []
    append = JsonlStore.append
    store.append = lambda records: (commits.append(len(records)), append(store, records))[1]  # type: ignore[method-assign]
    for ticket in tickets:
        assert ticket is not None
        ticket.result(timeout=10)
    assert len(commits) <= 3
    assert sum(commits) == 200
    writer.close()


def test_an_outage_loses_nothing_and_holds_what_waits(tmp_path: Path) -> None:
    watch = Watch()
    writer, store = failing_writer(tmp_path, watch)
    ticket = writer.submit(decision())
    assert ticket is not None
    until(lambda: writer.is_failing)
    with pytest.raises(TimeoutError):
        ticket.result(timeout=0.3)
    store.full = False
    ticket.result(timeout=10)
    assert not writer.is_failing
    assert writer.close()
    again = open_store(settings_of("jsonl", tmp_path).url)
    assert [type(event) for event in events_of(again)] == [Started, Decision, Stopped]
    assert verify(again, [KEY]).holds


def test_what_was_dropped_is_counted_and_is_an_event(tmp_path: Path) -> None:
    watch = Watch()
    writer, store = failing_writer(tmp_path, watch, durability="async", on_full="drop", queue=16)
    writer.submit(decision())
    until(lambda: watch.failures)  # the first one is in hand, so the queue is empty
    for _ in range(16 + 7):
        writer.submit(decision())
    assert (writer.is_full, watch.lost, watch.most_waiting) == (True, 7, 16)
    store.full = False
    until(lambda: not writer.is_full)
    assert writer.close()
    again = open_store(settings_of("jsonl", tmp_path).url)
    assert [event.count for event in events_of(again) if isinstance(event, Dropped)] == [7]
    assert len([event for event in events_of(again) if isinstance(event, Decision)]) == 17
    assert verify(again, [KEY]).holds


@pytest.mark.parametrize(("on_error", "lost"), [("block", 0), ("allow", 4)])
def test_while_it_cannot_be_written_a_full_queue_follows_on_error(tmp_path: Path, on_error: str, lost: int) -> None:
    watch = Watch()
    writer, store = failing_writer(tmp_path, watch, on_error=on_error, queue=16)
    writer.submit(decision())
    until(lambda: writer.is_failing)
    for _ in range(20):
        writer.submit(decision())
    assert watch.lost == lost
    store.full = False
    assert writer.close()


def test_it_ends_in_an_outage_and_says_that_it_lost_events(tmp_path: Path) -> None:
    writer, _ = failing_writer(tmp_path, Watch())
    writer.submit(decision())
    began = time.monotonic()
    assert not writer.close()
    assert time.monotonic() - began < 5


def test_checkpoints_are_sent_at_the_end_at_the_latest(tmp_path: Path) -> None:
    settings, sink = settings_of("sqlite", tmp_path), CheckpointFile(tmp_path / "checkpoints")
    writer = new_writer(settings, Watch(), sink=sink)
    writer.submit(decision())
    assert writer.close()
    checkpoints = read_checkpoints(tmp_path / "checkpoints")
    assert [(item.writer, item.seq) for item in checkpoints][-1] == (writer.writer, 2)
    assert verify(open_store(settings.url), [KEY], checkpoints).holds


def test_retention_removes_what_is_old(tmp_path: Path) -> None:
    settings = settings_of("sqlite", tmp_path, retention="30d")
    old = datetime.now(UTC) - timedelta(days=31)
    gone, records = chain_of(4, times=[old] * 4)
    store = open_store(settings.url, make=True)
    store.append(records)
    writer = new_writer(settings, Watch())
    until(lambda: gone.writer not in store.writers())
    assert writer.close()
    (pruned,) = [event for event in events_of(store) if isinstance(event, Pruned)]
    assert [(chain.writer, chain.below) for chain in pruned.chains] == [(gone.writer, 6)]
    assert verify(store, [KEY]).holds


def test_metrics_are_exact(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    settings = settings_of("sqlite", tmp_path)
    writer = AuditWriter(open_store(settings.url, make=True), KEY, settings, AuditMetrics(registry))
    writer.start(Started(program="test"))
    for _ in range(3):
        ticket = writer.submit(decision())
        assert ticket is not None
        ticket.result(timeout=10)
    assert writer.close()
    value = registry.get_sample_value
    assert value("telltale_audit_events_total", {"kind": "decision"}) == 3
    assert value("telltale_audit_events_total", {"kind": "dropped"}) == 0
    assert value("telltale_audit_seconds_count") == 4
    assert value("telltale_audit_queue") == 0
    assert value("telltale_audit_errors_total") == value("telltale_audit_dropped_total") == 0
