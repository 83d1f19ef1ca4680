"""The audit trail in a real PostgreSQL: as on SQLite, and it outlives a crash of the writer and of the database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from monitor.audit.erasure import erase
from monitor.audit.errors import AuditStoreError
from monitor.audit.record import Chain
from monitor.audit.store import Selector, Store, open_store
from monitor.audit.verify import verify
from monitor.audit.writer import AuditWriter
from monitor.events import Content, Started
from tests.support.postgresql import Cluster, postgresql
from tests.unit.audit_trail import KEY, Watch, chain_of, decision, settings_of
from tests.unit.test_audit_writer import events_of, killed_under_load, until

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with postgresql() as running:
        yield running


@pytest.fixture
def store(cluster: Cluster) -> Iterator[Store]:
    made = open_store(cluster.url, make=True)
    engine = create_engine(cluster.url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE telltale_audit"))
    engine.dispose()
    yield made
    made.close()


def change(cluster: Cluster, statement: str) -> None:
    engine = create_engine(cluster.url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


def test_records_are_kept_verified_and_erased(store: Store) -> None:
    chain, records = chain_of(6)
    store.append(records)
    store.append(records)
    assert [stored.record for stored in store.read(chain.writer)] == records
    own = Chain(KEY)
    assert [item.seq for item in erase(store, own, Selector.TENANT, "acme")] == [2, 4, 6]
    proof = verify(store, [KEY])
    assert (proof.findings, proof.erased) == ([], 3)


@pytest.mark.parametrize(
    "column", ["event", "mac", "prev", "commitment", "content", "salt", "key_id", "tenant", "time"]
)
def test_a_changed_column_is_found_and_named(cluster: Cluster, store: Store, column: str) -> None:
    chain, records = chain_of(4)
    store.append(records)
    value = "time + 1" if column == "time" else f"overlay({column} placing '~' from 3)"
    change(cluster, f"UPDATE telltale_audit SET {column} = {value} WHERE seq = 2")  # noqa: S608 - our own words
    assert (chain.writer, 2) in {(found.writer, found.seq) for found in verify(store, [KEY]).findings}


def test_a_missing_row_is_found_and_named(cluster: Cluster, store: Store) -> None:
    _, records = chain_of(4)
    store.append(records)
    change(cluster, "DELETE FROM telltale_audit WHERE seq = 3")
    (finding,) = verify(store, [KEY]).findings
    assert "record 3 is missing" in finding.what


def test_whatever_clients_call_their_requests_can_be_stored(store: Store) -> None:
    chain = Chain(KEY)
    about = Content(request_id="nul\0 and \u2603 and \ud800", prompt="\0\ud800")
    store.append([chain.add(decision(), about)])
    assert [item.seq for item in store.find(Selector.REQUEST, about.request_id)] == [0]
    assert verify(store, [KEY]).holds


def test_a_killed_writer_loses_nothing_that_it_acknowledged(cluster: Cluster, store: Store, tmp_path: Path) -> None:
    acknowledged = killed_under_load("postgresql", cluster.url, tmp_path)
    assert acknowledged <= {str(event.id) for event in events_of(store)}
    assert verify(store, [KEY]).holds


def test_a_crash_of_the_database_loses_nothing_and_is_overcome(cluster: Cluster, store: Store, tmp_path: Path) -> None:
    settings, watch = settings_of("sqlite", tmp_path, url=cluster.url), Watch()
    writer = AuditWriter(open_store(cluster.url), KEY, settings, watch)
    writer.start(Started(program="test"))
    first = decision()
    ticket = writer.submit(first)
    assert ticket is not None
    ticket.result(timeout=10)
    cluster.stop()
    second = decision()
    held = writer.submit(second)
    assert held is not None
    until(lambda: writer.is_failing, seconds=30)
    assert not held.done()
    cluster.start()
    held.result(timeout=30)
    assert writer.close()
    assert {first.id, second.id} <= {event.id for event in events_of(store)}
    assert verify(store, [KEY]).holds


def test_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(AuditStoreError, match=r"\*\*\*@127.0.0.1.*refused"):
        open_store("postgresql://user:secret@127.0.0.1:1/none")
