"""The API process ends with an error when its engine has ended, and without one when it was asked to stop."""

from __future__ import annotations

import asyncio

import pytest

from serving.engine.lifeline import Lifeline


class Engine:
    """As much of vLLM's client as the lifeline looks at."""

    def __init__(self) -> None:
        self.errored = False

    def shutdown(self, timeout: float | None = None) -> None:
        self.errored = True


class Watched:
    def __init__(self, grace: float = 0.0) -> None:
        self.engine, self.calls = Engine(), list[str]()
        self.lifeline = Lifeline(
            self.engine,
            ended=lambda: self.calls.append("ended"),
            leave=lambda: self.calls.append("leave"),
            grace=grace,
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
