"""What the audit trail costs: an event in the API process's thread, and clients that wait for theirs to be stored."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from monitor.audit.redaction import KeptTexts
from monitor.audit.store import open_store
from monitor.audit.writer import AuditWriter
from monitor.events import Started
from serving.engine.ledger import Ending, Ledger
from serving.engine.records import Record
from tests.bench.monitored_load import make_plan
from tests.unit.audit_trail import KEY, SCHEMES, Watch, content, decision, settings_of

CLIENTS = 64
EVENTS = 1024


@pytest.fixture
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AuditWriter]:
    settings = settings_of(request.param, tmp_path, queue=1_000_000)
    made = AuditWriter(open_store(settings.url, make=True), KEY, settings, Watch())
    made.start(Started(program="bench"))
    yield made
    made.close(timeout=60)


@pytest.mark.parametrize("writer", ["sqlite"], indirect=True)
def test_handing_in_an_event(benchmark: Any, writer: AuditWriter, tmp_path: Path) -> None:
    """Of a request with 64 detectors; the rest happens in the writer's thread."""
    plan = make_plan(tmp_path)
    ledger = Ledger(plan, writer, KeptTexts(settings_of("sqlite", tmp_path)), str)
    record = Record(plan)
    record.statistics = [0.5] * len(plan.checks)
    record.fired = [False] * len(plan.checks)
    ending = Ending("a", "a", prompt=range(100), reply=range(100), finish_reason="stop")
    benchmark.pedantic(ledger.ended, args=(record, ending), rounds=500, warmup_rounds=20)


@pytest.mark.parametrize("writer", SCHEMES, indirect=True)
def test_1024_events_of_64_clients_that_wait(benchmark: Any, writer: AuditWriter) -> None:
    def ask(number: int) -> None:
        ticket = writer.submit(decision(), lambda: content(number))
        assert ticket is not None
        ticket.result(timeout=60)

    with ThreadPoolExecutor(CLIENTS) as clients:
        benchmark.pedantic(lambda: list(clients.map(ask, range(EVENTS))), rounds=10, warmup_rounds=1)
