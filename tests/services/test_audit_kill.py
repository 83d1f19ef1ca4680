"""A server with its audit trail in PostgreSQL, killed in the middle of a load: nothing that was answered is missing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitor.audit.key import read_key
from monitor.audit.store import open_store
from monitor.audit.verify import verify
from monitor.events import Decision
from tests.engine.conftest import GUARDED
from tests.engine.test_audit import BEFORE_THE_KILL, CLIENTS, keep_asking, kill_tree
from tests.support.postgresql import Cluster, postgresql
from tests.support.server import Server, serving, telltale_command
from tests.support.tiny import TinyModel

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with postgresql() as running:
        yield running


def answered_ids(cluster: Cluster) -> set[str]:
    """Of the requests that have an event, as their clients know them."""
    store = open_store(cluster.url)
    found = {
        str(entry.content.client_request_id)
        for writer in store.writers()
        for entry in store.read(writer)
        if isinstance(entry.event, Decision) and entry.content is not None
    }
    store.close()
    return found


def load_until_killed(server: Server, answered: list[str]) -> None:
    threads = [threading.Thread(target=keep_asking, args=(server, n, answered)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    while len(answered) < BEFORE_THE_KILL:
        assert any(thread.is_alive() for thread in threads)
        threads[0].join(0.05)
    kill_tree(server)
    for thread in threads:
        thread.join(timeout=60)


def test_every_answered_request_has_its_event_after_a_kill(tiny: TinyModel, cluster: Cluster, tmp_path: Path) -> None:
    for file in tiny.path.parent.glob("trigger.*"):
        (tmp_path / file.name).symlink_to(file)
    policy = tmp_path / "telltale.yaml"
    policy.write_text(f"{GUARDED}audit: {{url: '{cluster.url}', durability: before_release}}\n")
    command, answered = telltale_command(tiny.path, policy), list[str]()
    with serving(command, tmp_path / "killed.log") as server:
        load_until_killed(server, answered)
    assert len(answered) >= BEFORE_THE_KILL
    # The database is there still, and the server goes on in a chain of its own.
    with serving(command, tmp_path / "restarted.log"):
        assert set(answered) <= answered_ids(cluster)
    proof = verify(open_store(cluster.url), [read_key(tmp_path / "audit.key")])
    assert proof.findings == []
    assert len(proof.records) == 2
