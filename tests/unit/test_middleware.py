"""The layer over all routes: reserved keys are refused however they are spelled, everything else passes untouched."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Message, Scope

from probes.card import Format
from serving.api.fields import REFUSED, refused_field
from serving.api.middleware import MonitorMiddleware, reserved_key
from serving.origin import Origin, current_origin

CHAT = "/v1/chat/completions"


async def echo(request: Request) -> Response:
    body = await request.body()
    return Response(body, headers={"x-origin": current_origin().fmt.value})


async def stream(request: Request) -> StreamingResponse:
    await request.body()

    async def parts() -> AsyncIterator[str]:
        for number in range(3):
            yield f"{number}:{current_origin().fmt.value};"

    return StreamingResponse(parts())


def make_app() -> MonitorMiddleware:
    routes = [
        Route("/stream", stream, methods=["POST"]),
        Route("/v1/chat/completions/stream", stream, methods=["POST"]),
        Route("/{path:path}", echo, methods=["GET", "POST"]),
    ]
    return MonitorMiddleware(Starlette(routes=routes))


@pytest.fixture
def client() -> TestClient:
    return TestClient(make_app())


SPELLINGS: list[dict[str, Any]] = [
    {"vllm_xargs": {"telltale": "x"}},
    {"vllm_xargs": {"Telltale_Policy": "x"}},
    {"extra_args": {"TELLTALE": {}}},
    {"sampling_params": {"extra_args": {"telltale": {"body": "", "mac": ""}}}},
    {"extra_body": {"vllm_xargs": {"telltale": 1}}},
    {"vllm_xargs": {"a": [1, {"b": {"telltale": 1}}]}},
    {"vllm_xargs": [[{"telltale": 1}]]},
    {"kv_transfer_params": {"telltale": 1}},
    {"ec_transfer_params": {"x": {"telltale": 1}}},
]


def escaped(text: str) -> str:
    """JSON with every letter of every key and value written as an escape."""
    return "".join(f"\\u{ord(letter):04x}" if letter.isalpha() else letter for letter in text)


@pytest.mark.covers("reserved key in a request", "kept out")
@pytest.mark.parametrize("body", SPELLINGS, ids=json.dumps)
def test_a_reserved_key_is_refused(client: TestClient, body: dict[str, Any]) -> None:
    response = client.post(CHAT, json={"messages": [], **body})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["code"]) == ("invalid_request_error", "reserved_key")
    assert "telltale" in error["param"].lower()
    assert error["param"].split(".")[0] == next(iter(body))
    assert "Leave it out" in error["message"]


@pytest.mark.covers("reserved key in a request", "kept out")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("body", SPELLINGS[:5], ids=json.dumps)
def test_no_encoding_gets_around_it(client: TestClient, body: dict[str, Any], encoding: str) -> None:
    """Whatever Python's parser, and so vLLM's, would read."""
    assert json.loads(json.dumps(body).encode(encoding)) == body
    assert client.post("/v1/completions", content=json.dumps(body).encode(encoding)).status_code == 400


@pytest.mark.covers("reserved key in a request", "kept out")
def test_no_escape_gets_around_it(client: TestClient) -> None:
    for key in ("telltale", "Telltale"):
        body = f'{{"{escaped("vllm_xargs")}": {{"{escaped(key)}": 1}}}}'
        assert json.loads(body) == {"vllm_xargs": {key: 1}}
        assert client.post(CHAT, content=body).status_code == 400
    assert client.post(CHAT, content='{"vllm_xargs": {"tell\\u0074ale": 1}}').status_code == 400


@given(depth=st.integers(0, 400))
def test_no_depth_gets_around_it(depth: int) -> None:
    body = '{"vllm_xargs":' + '{"a":' * depth + '{"telltale":1}' + "}" * (depth + 1)
    assert reserved_key(json.loads(body)) == "vllm_xargs." + "a." * depth + "telltale"


@pytest.mark.covers("beam search", "kept out")
def test_beam_search_is_refused_with_its_reason(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"prompt": "a", "use_beam_search": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "use_beam_search"
    assert "one token at a time" in response.json()["error"]["message"]
    assert (
        client.post("/v1/completions", json={"prompt": "use_beam_search", "use_beam_search": False}).status_code == 200
    )


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_a_field_that_brings_what_nobody_scored_is_refused(client: TestClient, field: str) -> None:
    for path in (CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/chat/completions/batch"):
        response = client.post(path, json={field: {"do_remote_prefill": True}})
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, field, "not_monitored")
        assert f"Leave {field!r} out" in error["message"]
        assert client.post(path, json={field: None}).status_code == 200
    assert client.post(CHAT, content=f'{{"{escaped(field)}": [1]}}').status_code == 400


@given(priority=st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)))
def test_no_client_comes_before_the_canaries(priority: float) -> None:
    for spelled in (priority, str(priority)):
        assert (refused_field({"priority": spelled}) is not None) == (priority < 0)


@pytest.mark.parametrize("priority", [None, "soon", "", [], {}, True])
def test_what_is_no_priority_is_left_to_vllm(client: TestClient, priority: object) -> None:
    assert client.post(CHAT, json={"priority": priority}).status_code == 200


def test_a_body_that_no_parser_reads_is_passed_on(client: TestClient) -> None:
    for body in (
        b'{"vllm_xargs": {"telltale"',
        b"telltale",
        b'"telltale"',
        b'["telltale"]',
        b"telltale\xff",
        b"[" * 100_000 + b"telltale",
    ):
        assert client.post(CHAT, content=body).content == body


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "What is a telltale sign? vllm_xargs: {telltale: 1}"}]},
        {"messages": [{"role": "user", "content": "telltale", "telltale": 1}]},
        {"prompt": "\\u0074elltale", "vllm_xargs": {"note": "telltale"}},
        {"model": "telltale", "tools": [{"function": {"name": "telltale", "parameters": {"telltale": {}}}}]},
        {"vllm_xargs": {"not_telltale": 1}},
        {"vllm_xargs": "telltale", "extra_args": None},
    ],
)
def test_the_word_alone_is_no_offence(client: TestClient, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    response = client.post(CHAT, content=content)
    assert (response.status_code, response.content) == (200, content)


@given(body=st.binary(max_size=200))
def test_any_body_is_replayed_intact(body: bytes) -> None:
    response = TestClient(make_app()).post(CHAT, content=body)
    assert (response.status_code, response.content) == (200, body)


def test_a_stream_passes_and_knows_its_origin(client: TestClient) -> None:
    assert client.post("/stream", content=b"{}").text == "0:raw;1:raw;2:raw;"
    assert client.post("/v1/chat/completions/stream", content=b"{}").text == "0:chat;1:chat;2:chat;"


def http(path: str = "/stream") -> Scope:
    return {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "root_path": ""}


async def ignore(message: Message) -> None:
    pass


async def test_a_body_in_pieces_is_replayed_piece_by_piece() -> None:
    given_messages: list[Message] = [
        {"type": "http.request", "body": b'{"vllm_', "more_body": True},
        {"type": "http.request", "body": b'xargs": 1}', "more_body": False},
        {"type": "http.disconnect"},
    ]
    waiting, seen = list(given_messages), []

    async def receive() -> Message:
        return waiting.pop(0)

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        seen.extend([await receive() for _ in range(3)])

    await MonitorMiddleware(app)(http(), receive, ignore)
    assert seen == given_messages


async def test_a_reserved_key_in_pieces_is_refused_before_the_handler() -> None:
    waiting: list[Message] = [
        {"type": "http.request", "body": part, "more_body": part != b"1}}"}
        for part in (b'{"vllm_xargs":{"tell', b'tale":', b"1}}")
    ]
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        raise AssertionError("the handler was reached")

    await MonitorMiddleware(app)(http(), receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 400
    assert int(dict(sent[0]["headers"])[b"content-length"]) == len(sent[1]["body"])


async def test_a_client_that_leaves_while_it_sends() -> None:
    waiting: list[Message] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]
    seen: list[Message] = []

    async def receive() -> Message:
        return waiting.pop(0)

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive()])

    await MonitorMiddleware(app)(http(), receive, ignore)
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]


async def test_cancellation_reaches_the_handler_and_the_origin_is_left() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    origins: list[Origin] = []

    async def connection() -> None:
        try:
            await MonitorMiddleware(app)(http(CHAT), receive, ignore)
        finally:
            origins.append(current_origin())

    task = asyncio.create_task(connection())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled.is_set()
    assert origins == [Origin(Format.RAW)]


async def test_what_is_not_http_passes() -> None:
    seen = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    async def receive() -> Message:
        raise AssertionError("nothing is read of it")

    for kind in ("websocket", "lifespan"):
        await MonitorMiddleware(app)({"type": kind}, receive, ignore)
    assert seen == ["websocket", "lifespan"]
