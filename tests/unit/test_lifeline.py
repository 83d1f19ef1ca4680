"""The API process ends with an error when its engine has ended, and without one when it was asked to stop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvicorn

from serving.engine.lifeline import Lifeline

KEPT = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
REQUEST = KEPT.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


class Engine:
    """As much of vLLM's client as the lifeline looks at."""

    def __init__(self) -> None:
        self.errored = False

    def shutdown(self, timeout: float | None = None) -> None:
        self.errored = True


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """What vLLM answers without an engine."""
    await send({"type": "http.response.start", "status": 500, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


class Watched:
    def __init__(self, grace: float = 0.0, drain: float = 0.0) -> None:
        self.engine, self.calls = Engine(), list[str]()
        self.server = uvicorn.Server(uvicorn.Config(refuse, port=0, log_level="error", lifespan="off"))
        self.server.servers = []
        self.lifeline = Lifeline(
            self.engine,
            lambda: self.server,
            ended=lambda: self.calls.append("ended"),
            leave=lambda: self.calls.append("leave"),
            grace=grace,
            drain=drain,
        )


@pytest.mark.covers("killed engine", "clean error and exit")
async def test_an_engine_that_dies_ends_the_process() -> None:
    watched = Watched()
    task = asyncio.create_task(watched.lifeline.watch())
    await asyncio.sleep(0)
    assert watched.calls == []
    watched.engine.errored = True
    await asyncio.wait_for(task, 5)
    assert watched.calls == ["ended", "leave"]


@pytest.mark.covers("killed engine", "clean error and exit")
async def test_also_where_vllm_stops_first() -> None:
    """vLLM shuts the dead engine's client down and cancels all tasks on its way out."""
    watched = Watched(grace=60)
    task = asyncio.create_task(watched.lifeline.watch())
    await asyncio.sleep(0)
    watched.engine.errored = True
    watched.engine.shutdown()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert watched.calls[-1] == "leave"


async def test_an_end_that_was_asked_for_is_no_error() -> None:
    watched = Watched()
    task = asyncio.create_task(watched.lifeline.watch())
    await asyncio.sleep(0)
    watched.engine.shutdown(timeout=1)
    await asyncio.wait_for(task, 5)
    assert watched.calls == []


@pytest.mark.covers("killed engine", "clean error and exit")
async def test_who_connected_in_time_is_answered_and_who_comes_later_finds_nobody() -> None:
    watched = Watched(grace=0.2, drain=2.0)
    serving = asyncio.create_task(watched.server.serve())
    while not watched.server.started:
        await asyncio.sleep(0.01)
    address = watched.server.servers[0].sockets[0].getsockname()[:2]
    in_time, writer = await asyncio.open_connection(*address)
    watching = asyncio.create_task(watched.lifeline.watch())
    watched.engine.errored = True
    with pytest.raises(ConnectionRefusedError):
        for _ in range(500):
            _, late = await asyncio.open_connection(*address)
            late.close()
            await asyncio.sleep(0.01)
    assert watched.calls == ["ended"]
    writer.write(REQUEST)
    assert (await asyncio.wait_for(in_time.read(), 5)).startswith(b"HTTP/1.1 500")
    writer.close()
    await asyncio.wait_for(watching, 5)
    assert watched.calls == ["ended", "leave"]
    watched.server.should_exit = True
    await asyncio.wait_for(serving, 5)


@pytest.mark.covers("killed engine", "clean error and exit")
async def test_a_connection_that_is_kept_open_is_closed_behind_an_answer() -> None:
    watched = Watched(grace=0.1, drain=1.0)
    serving = asyncio.create_task(watched.server.serve())
    while not watched.server.started:
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection(*watched.server.servers[0].sockets[0].getsockname()[:2])
    watching = asyncio.create_task(watched.lifeline.watch())
    watched.engine.errored = True
    answers = 0
    while not watched.server.should_exit:
        writer.write(KEPT)
        assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 500")
        while await reader.readline() != b"\r\n":
            pass
        answers += 1
        await asyncio.sleep(0.01)
    assert await asyncio.wait_for(reader.read(), 5) == b""
    assert answers > 10
    assert watched.calls == ["ended"]
    writer.close()
    await asyncio.wait_for(asyncio.gather(serving, watching), 5)
    assert watched.calls == ["ended", "leave"]
