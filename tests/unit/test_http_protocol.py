"""A request's head has an end, before any layer sees it; over a real socket."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
import uvicorn.config
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from serving.api.protocol import MAX_HEAD_BYTES, BoundedHttpProtocol, use_bounded_protocol


async def length(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    use_bounded_protocol()
    config = uvicorn.Config(Starlette(routes=[Route("/", length, methods=["POST"])]), log_level="critical")
    config.load()
    assert config.http_protocol_class is BoundedHttpProtocol
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        yield int(listener.getsockname()[1])
        server.should_exit = True
        thread.join(timeout=20)


def test_a_head_without_end_is_refused_and_a_long_body_is_not(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for size in (0, 2 * MAX_HEAD_BYTES, 3):  # on one connection: each head is counted for itself
            assert client.post("/", content=b"x" * size, headers={"x-a": "y" * 60_000}).text == str(size)
    for piece in (b"y" * 65536, b"x: y\r\n" * 8192):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            sent, answered = 0, b""
            connection.sendall(b"POST / HTTP/1.1\r\nhost: a\r\nx-long: ")
            try:
                while sent < 20 * MAX_HEAD_BYTES:
                    connection.sendall(piece)
                    sent += len(piece)
                answered = connection.recv(100)
            except OSError:  # it hung up
                pass
            assert sent < 10 * MAX_HEAD_BYTES, answered
