"""Logs as JSON: one object a line, ours and Python's alike, with the request and its tenant, and without secrets."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import serving.json_logs as logs
from serving.api.request_ids import RequestIds
from serving.log_format import LogFormat

PROGRAM = """
import logging, logging.config, json, sys
import structlog
from serving.json_logs import use_log_format
use_log_format()
logging.config.dictConfig(json.load(open(sys.argv[1])))
log = structlog.get_logger("ours")
structlog.contextvars.bind_contextvars(request_id="r-1", tenant="acme")
log.info("said by us", number=1, text="two\\nlines")
logging.getLogger("vllm.engine").info("said by %s", "vLLM")
logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:1", "POST", "/v1", "1.1", 200)
try:
    swordfish = "a local variable: swordfish"
    raise ValueError("no good")
except ValueError:
    log.exception("it broke")
    logging.getLogger("vllm").exception("it broke there too")
"""


def run(folder: Path, chosen: str) -> list[str]:
    """What a process of its own writes."""
    file = folder / "program.py"
    file.write_text(PROGRAM)
    config = Path(logs.__file__).with_name("json_logs.json")
    found = subprocess.run(
        [sys.executable, file, config],
        env={**os.environ, logs.FORMAT_VARIABLE: chosen},
        capture_output=True,
        text=True,
        check=True,
    )
    return [*found.stdout.splitlines(), *found.stderr.splitlines()]


def test_every_line_is_an_object_with_its_request(tmp_path: Path) -> None:
    text = run(tmp_path, "json")
    lines = [json.loads(line) for line in text]
    assert [line["event"] for line in lines] == [
        "said by us",
        "said by vLLM",
        '127.0.0.1:1 - "POST /v1 HTTP/1.1" 200',
        "it broke",
        "it broke there too",
    ]
    for line in lines:
        assert {"timestamp", "level", "process"} <= line.keys()
        assert (line["request_id"], line["tenant"]) == ("r-1", "acme")
    assert [line["level"] for line in lines] == ["info", "info", "info", "error", "error"]
    assert lines[0]["text"] == "two\nlines"
    assert lines[1]["logger"] == "vllm.engine"
    # The error is told with its frames, but what stood in their variables is not: prompts may.
    assert [line["exception"][0]["exc_value"] for line in lines[3:]] == ["no good", "no good"]
    assert "swordfish" not in "".join(line for line in text if "frames" in line)


def test_text_is_left_as_it_was(tmp_path: Path) -> None:
    first = run(tmp_path, "text")[0]
    with pytest.raises(json.JSONDecodeError):
        json.loads(first)


def test_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "xml")
    with pytest.raises(logs.LogFormatError, match="must be text or json"):
        logs.log_format()


def test_the_processes_of_a_server_are_told_and_an_operators_own_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(logs.VLLM_VARIABLE, raising=False)
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "")
    logs.pass_on(LogFormat.TEXT)
    assert logs.VLLM_VARIABLE not in os.environ
    logs.pass_on(LogFormat.JSON)
    assert json.loads(Path(os.environ[logs.VLLM_VARIABLE]).read_text())["version"] == 1
    assert logs.log_format() is LogFormat.JSON
    monkeypatch.setenv(logs.VLLM_VARIABLE, "/etc/own.json")
    logs.pass_on(LogFormat.JSON)
    assert os.environ[logs.VLLM_VARIABLE] == "/etc/own.json"


async def ask(app: RequestIds, *given: str) -> list[httpx2.Response]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        return list(await asyncio.gather(*(client.get("/", headers={"x-request-id": one}) for one in given)))


async def test_each_request_is_logged_under_its_own_id() -> None:
    """Also while others are served."""

    async def handle(request: Request) -> Response:
        await asyncio.sleep(0.01)
        structlog.contextvars.bind_contextvars(tenant=f"of-{request.headers['x-request-id']}")
        await asyncio.sleep(0.01)
        bound = structlog.contextvars.get_contextvars()
        return JSONResponse(bound | {"header": request.headers["x-request-id"]})

    app = RequestIds(Starlette(routes=[Route("/", handle)]))
    ids = [f"id-{number}" for number in range(8)]
    for response, own in zip(await ask(app, *ids), ids, strict=True):
        assert response.json() == {"request_id": own, "tenant": f"of-{own}", "header": own}
        assert response.headers["x-request-id"] == own
    assert structlog.contextvars.get_contextvars() == {}


@pytest.mark.parametrize("given", ["", "x" * 129, "tab\there", "umlaut-\xfc"])
async def test_an_id_that_cannot_be_used_is_replaced(given: str) -> None:
    async def handle(request: Request) -> Response:
        return JSONResponse(request.headers.getlist("x-request-id"))

    app = RequestIds(Starlette(routes=[Route("/", handle)]))
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.get("/", headers=[(b"x-request-id", given.encode("latin-1"))])
    (used,) = response.json()
    assert used != given
    assert len(used) == 32
