"""Where a request came from: told by its route, for the time of the request, in its own task only."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Message, Scope

from monitor.segments import PromptMap, Run
from monitor.types import PromptEvent, Role
from probes.card import Format
from serving.api.middleware import MonitorMiddleware
from serving.origin import Origin, current_origin, enter_origin, leave_origin

CHAT = "/v1/chat/completions"


async def say_origin(request: Request) -> Response:
    return Response(headers={"x-origin": current_origin().fmt.value})


async def fail(request: Request) -> Response:
    raise RuntimeError("the handler failed")


@pytest.fixture
def client() -> TestClient:
    routes = [Route("/fail", fail, methods=["POST"]), Route("/{path:path}", say_origin, methods=["GET", "POST"])]
    return TestClient(MonitorMiddleware(Starlette(routes=routes)))


@pytest.mark.parametrize(
    ("path", "fmt"),
    [
        ("/v1/chat/completions", "chat"),
        ("/v1/chat/completions/", "chat"),
        ("/v1/chat/completions/batch", "chat"),
        ("/v1/responses", "chat"),
        ("/v1/messages", "chat"),
        ("/v2/chat", "chat"),
        ("/cohere/v2/chat", "chat"),
        ("/v1/systemone", "chat"),
        ("/v1/completions", "raw"),
        ("/v1/chat/completionsx", "raw"),
        ("/inference/v1/generate", "raw"),
        ("/other/v1/chat/completions", "raw"),
    ],
)
def test_the_route_tells_the_format(client: TestClient, path: str, fmt: str) -> None:
    assert client.post(path, content=b"{}").headers["x-origin"] == fmt
    assert client.get(path).headers["x-origin"] == fmt


@pytest.mark.parametrize(
    ("body", "fmt"),
    [
        (b'{"messages": [{"role": "user", "content": "x"}]}', "chat"),
        ('{"messages": []}'.encode("utf-16"), "chat"),
        (b'{"prompt": "messages"}', "raw"),
        (b"[]", "raw"),
        (b"no JSON", "raw"),
    ],
)
def test_where_one_route_takes_all_bodies_the_body_tells(client: TestClient, body: bytes, fmt: str) -> None:
    for path in ("/invocations", "/invocations/"):
        assert client.post(path, content=body).headers["x-origin"] == fmt
    assert client.post("/v1/completions", content=body).headers["x-origin"] == "raw"


def test_a_root_path_is_not_part_of_the_route() -> None:
    app = MonitorMiddleware(Starlette(routes=[Route("/{path:path}", say_origin, methods=["POST"])]), root_path="/api/")
    assert TestClient(app).post("/api/v1/chat/completions", content=b"{}").headers["x-origin"] == "chat"


def test_the_origin_ends_with_the_request(client: TestClient) -> None:
    client.post(CHAT, content=b"{}")
    with pytest.raises(RuntimeError, match="the handler failed"):
        client.post("/fail", content=b"{}")
    assert current_origin() == Origin(Format.RAW)
    token = enter_origin(Origin(Format.CHAT))
    assert current_origin().fmt is Format.CHAT
    leave_origin(token)
    assert current_origin().fmt is Format.RAW


async def test_requests_side_by_side_keep_their_origins() -> None:
    both, seen = asyncio.Barrier(2), {}

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        await both.wait()
        seen[scope["path"]] = current_origin().fmt

    layer = MonitorMiddleware(app)
    await asyncio.gather(*(layer(http(path), receive, ignore) for path in (CHAT, "/v1/completions")))
    assert seen == {CHAT: Format.CHAT, "/v1/completions": Format.RAW}


async def test_what_one_task_notes_another_of_the_same_request_finds() -> None:
    """vLLM renders in a task of its own, which ends before a streamed reply is signed."""
    known = {size: PromptMap((Run(Role.TOOL, size),), stream_from=size) for size in (1, 2, 3)}

    async def render(size: int) -> None:
        await asyncio.sleep(0)
        current_origin().note(list(range(size)), known[size])

    for fmt in Format:
        token = enter_origin(Origin(fmt))
        await asyncio.gather(*(asyncio.create_task(render(size)) for size in known))
        found = [current_origin().prompt_of(range(size)) for size in known]
        missing = current_origin().prompt_of([7, 8])
        leave_origin(token)
        if fmt is Format.CHAT:
            assert found == list(known.values())
            # Tokens that no messages of this request became: no rule steps over them, streams read them all.
            assert missing == PromptMap(None, 0, (PromptEvent.SEGMENTS_UNKNOWN,))
        else:
            assert found == [PromptMap((Run(Role.USER, size),), stream_from=0) for size in known]
    assert Origin(Format.CHAT).prompt_of([0]) == PromptMap.unknown()


def http(path: str) -> Scope:
    return {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "root_path": ""}


async def ignore(message: Message) -> None:
    pass
