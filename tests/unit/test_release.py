"""Nothing of a response leaves before its events are stored, and nothing at all where they cannot be."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from monitor.audit.metrics import AuditMetrics
from monitor.audit.settings import AuditSettings
from monitor.audit.writer import AuditWriter
from monitor.events import Started
from monitor.policy import Plan
from serving.api.auditing import Audit
from serving.api.middleware import MonitorMiddleware
from serving.origin import current_origin
from tests.unit.artifacts import make_card, plan_of, policy_text, rule, unit_artifact
from tests.unit.audit_trail import KEY, decision, settings_of
from tests.unit.test_audit_writer import DiskThatFills, until

WHOLE, STREAM = "/v1/chat/completions", "/stream"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    text = policy_text(rule("stop", when="aggregate: {kind: max}, above: {value: 2.0}"))
    return plan_of(tmp_path_factory.mktemp("plan"), text, {"harm": unit_artifact(make_card())})


class Server:
    """An application whose requests have an event each, behind the middleware, on a disk that may be full."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        settings: AuditSettings = settings_of("jsonl", folder, **changes)
        self.disk = DiskThatFills.open(settings.url, durable=True, make=True)
        self.registry = CollectorRegistry()
        metrics = AuditMetrics(self.registry)
        self.writer = AuditWriter(self.disk, KEY, settings, metrics)
        self.writer.start(Started(program="test"))
        self.audit = Audit(settings, self.writer, metrics)
        self.tickets: list[Future[None]] = []
        routes = [Route(WHOLE, self._whole, methods=["POST"]), Route(STREAM, self._stream, methods=["POST"])]
        self.app = MonitorMiddleware(Starlette(routes=routes), audit=lambda: self.audit, patience=0.5)

    def _end(self) -> None:
        ticket = self.writer.submit(decision())
        if ticket is not None:
            self.tickets.append(ticket)
            current_origin().tickets.append(ticket)

    async def _whole(self, request: Request) -> JSONResponse:
        self._end()
        return JSONResponse({"said": "whole"})

    async def _stream(self, request: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "data: first\n\n"
            self._end()
            yield "data: last\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")

    async def post(self, path: str) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json={})

    def withheld(self) -> float | None:
        return self.registry.get_sample_value("telltale_audit_withheld_total")


@pytest.mark.parametrize("path", [WHOLE, STREAM])
async def test_a_response_leaves_when_its_event_is_stored(tmp_path: Path, path: str) -> None:
    server = Server(tmp_path)
    response = await server.post(path)
    assert response.status_code == 200
    assert [ticket.done() for ticket in server.tickets] == [True]
    assert response.text in ('{"said":"whole"}', "data: first\n\ndata: last\n\ndata: [DONE]\n\n")
    assert server.writer.close()


async def test_a_whole_response_waits_and_is_withheld_at_last(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.disk.full = True
    response = await server.post(WHOLE)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "audit_unavailable"
    assert "whole" not in response.text
    # The next one is not even begun: nobody computes what cannot be released.
    assert (await server.post(WHOLE)).status_code == 503
    assert len(server.tickets) == 1
    assert server.withheld() == 2
    server.disk.full = False
    until(lambda: not server.writer.is_failing)
    assert (await server.post(WHOLE)).status_code == 200
    assert server.writer.close()


async def test_a_stream_ends_with_an_error_in_the_place_of_its_end(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.disk.full = True
    response = await server.post(STREAM)
    events = response.text.split("\n\n")
    assert events[0] == "data: first"
    assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "audit_unavailable"
    assert "last" not in response.text
    assert "[DONE]" not in response.text
    server.writer.close()


async def test_it_waits_as_long_as_the_disk_takes(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.disk.full = True
    asked = asyncio.create_task(server.post(WHOLE))
    await asyncio.sleep(0.2)
    assert not asked.done()
    server.disk.full = False
    assert (await asked).status_code == 200
    assert server.writer.close()


@pytest.mark.parametrize("changes", [{"durability": "async"}, {"on_error": "allow"}])
async def test_whoever_chose_so_is_answered_all_the_same(tmp_path: Path, changes: dict[str, str]) -> None:
    server = Server(tmp_path, **changes)
    server.disk.full = True
    for _ in range(3):
        assert (await server.post(WHOLE)).status_code == 200
    assert server.withheld() == 0
    server.writer.close()


async def test_a_full_queue_holds_new_requests_until_there_is_room(tmp_path: Path) -> None:
    server = Server(tmp_path, durability="async", on_error="block", queue=16)
    gate = threading.Event()
    server.disk.append = lambda records: gate.wait() and None  # type: ignore[method-assign]
    server.writer.submit(decision())
    await asyncio.sleep(0.05)  # it is in the writer's hands
    for _ in range(16):
        server.writer.submit(decision())
    asked = asyncio.create_task(server.post(WHOLE))
    await asyncio.sleep(0.3)
    assert not asked.done()
    gate.set()
    assert (await asked).status_code == 200
    server.writer.close()
