"""Sessions in a real PostgreSQL: shared by processes, changed in one piece, bounded, and gone when the database is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import create_engine, text

from monitor.session import Session, advance
from monitor.sessions.postgresql import PostgresqlStore
from monitor.sessions.settings import SessionSettings
from monitor.sessions.store import SessionKey, SessionStore, SessionStoreError
from monitor.types import ON_SESSION_FAILURE, Action
from probes.card import Format
from serving.api.sessions import open_sessions
from serving.origin import Caller
from serving.sitting import Reading
from tests.support.postgresql import Cluster, postgresql
from tests.unit.test_session_layer import plan
from tests.unit.test_sessions import HIGH

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with postgresql() as running:
        yield running


def settings_of(cluster: Cluster, **changes: object) -> SessionSettings:
    made = SessionSettings(url=cluster.url, on_failure=Action.BLOCK, idle="100s")
    return made.model_copy(update=changes)


def opened(cluster: Cluster, **changes: object) -> PostgresqlStore:
    store = PostgresqlStore.open(settings_of(cluster, **changes))
    run(cluster, "TRUNCATE telltale_sessions")
    return store


def run(cluster: Cluster, statement: str) -> list[object]:
    engine = create_engine(cluster.url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        with engine.begin() as connection:
            result = connection.execute(text(statement))
            return [tuple(row) for row in result] if result.returns_rows else []
    finally:
        engine.dispose()


def see(store: SessionStore, name: str, statistic: float, now: float, tenant: str = "t") -> Session:
    key = SessionKey.of(tenant, name)
    return store.update(key, lambda old: advance(old, [(HIGH, statistic)], now)[0], now)


def read(store: SessionStore, name: str, now: float, tenant: str = "t") -> Session | None:
    return store.read(SessionKey.of(tenant, name), now)


def test_two_replicas_see_one_session_and_lose_nothing(cluster: Cluster) -> None:
    stores = [opened(cluster), PostgresqlStore.open(settings_of(cluster))]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: see(stores[number % 2], "s", 0.0, 1000.0), range(100)))
    for store in stores:
        found = read(store, "s", 1001.0)
        assert found is not None
        assert found.requests == 100
        assert read(store, "s", 1001.0, tenant="u") is None
    see(stores[0], "s", 5.0, 1002.0)
    later = read(stores[1], "s", 1003.0)
    assert later is not None
    assert later.stand("k", 1003.0)
    assert read(stores[1], "s", 1102.5) is None
    for store in stores:
        store.close()


def test_no_flood_frees_whoever_is_blocked(cluster: Cluster) -> None:
    counted: list[int] = []
    store = opened(cluster)
    store = PostgresqlStore.open(settings_of(cluster, per_tenant=3), counted.append)
    see(store, "blocked", 5.0, 1000.0)
    for number in range(20):
        see(store, f"other-{number}", 0.0, 1000.0 + number / 10)
    held = read(store, "blocked", 1010.0)
    assert held is not None
    assert held.stand("k", 1010.0)
    assert sum(counted) == 18
    for number in range(2):
        see(store, f"more-{number}", 5.0, 1010.0)
    # Now all three are blocked: what comes shares one session, and fires there.
    see(store, "fresh", 0.0, 1011.0)
    assert see(store, "fresher", 5.0, 1012.0).requests == 2
    for name in ("fresh", "never seen", "blocked", "more-0"):
        found = read(store, name, 1013.0)
        assert found is not None
        assert found.stand("k", 1013.0), name
    assert run(cluster, "SELECT count(*) FROM telltale_sessions") == [(4,)]
    assert read(store, "never seen", 1013.0, tenant="u") is None
    # What has ended is removed, also where nobody asks for it.
    see(store, "long after", 0.0, 9000.0)
    assert run(cluster, "SELECT count(*) FROM telltale_sessions") == [(1,)]
    store.close()


def test_nothing_that_a_client_said_is_stored(cluster: Cluster) -> None:
    store = opened(cluster)
    see(store, "a name of mine", 0.0, 1000.0, tenant="acme")
    (row,) = run(cluster, "SELECT * FROM telltale_sessions")
    assert "mine" not in str(row)
    assert "acme" not in str(row)
    store.close()


def test_a_damaged_row_is_an_error_that_says_so(cluster: Cluster) -> None:
    store = opened(cluster)
    see(store, "s", 0.0, 1000.0)
    run(cluster, "UPDATE telltale_sessions SET state = '{}'")
    with pytest.raises(SessionStoreError, match="no session"):
        read(store, "s", 1001.0)
    with pytest.raises(SessionStoreError, match="no session"):
        see(store, "s", 0.0, 1001.0)
    store.close()


def test_a_database_that_goes_and_comes_back(tmp_path: Path) -> None:
    with postgresql() as cluster:
        head = f"sessions: {{url: '{cluster.url}', on_failure: block}}\n"
        made = plan(tmp_path, head=head)
        registry = CollectorRegistry()
        sessions = open_sessions(lambda: made, settings_of(cluster), registry)

        async def request(statistic: float) -> tuple[str, ...]:
            sitting = await sessions.begin(Caller("t", "s"))
            assert sitting is not None
            sitting.take(Reading("r", made, 0, Format.CHAT, [statistic] * len(made.checks)))
            await sitting.settled()
            return sitting.imposed

        async def story() -> list[tuple[str, ...]]:
            said = [await request(3.0), await request(3.0)]
            cluster.stop()
            began = time.monotonic()
            said.append(await request(0.0))
            assert time.monotonic() - began < 10
            cluster.start()
            said.append(await request(0.0))
            return said

        assert asyncio.run(story()) == [(), (), (ON_SESSION_FAILURE,), ("stop", "note")]
        for operation, count in (("read", 1), ("update", 2)):
            labels = {"operation": operation}
            assert registry.get_sample_value("telltale_session_store_errors_total", labels) == count
        sessions.close()


def test_a_database_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    made = plan(tmp_path)
    settings = SessionSettings(url="postgresql://telltale:a-secret@127.0.0.1:9/none", on_failure=Action.FLAG)
    with pytest.raises(SessionStoreError) as caught:
        open_sessions(lambda: made, settings, CollectorRegistry())
    assert "See that it can be reached" in str(caught.value)
    assert "a-secret" not in str(caught.value)
