"""The client behind one request whose answer is made in several attempts. Knows no route."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Message, Receive

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client has left: nobody waits for an answer any more."""


class Client:
    """Gives every attempt the request's body, and notices when the client leaves.

    Args:
        receive: ASGI's own.

    Attributes:
        gone: whether the client has left, as far as anybody has heard.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.gone = False

    async def read(self) -> bytes:
        """The body. To be called once, before anything else."""
        parts: list[bytes] = []
        while True:
            message = await self._next()
            if message["type"] != "http.request":
                return b"".join(parts)
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)

    def with_body(self, body: bytes) -> Receive:
        """ASGI's ``receive`` for one attempt, whose body this is."""
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return waiting.pop() if waiting else await self._next()

        return receive

    async def unless_gone(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of some work, unless the client leaves before.

        Args:
            work: cancelled if the client leaves.
        Raises:
            ClientGoneError: it has left.
        """
        task = asyncio.create_task(work)
        listening = asyncio.create_task(self._until_gone())
        try:
            await asyncio.wait({task, listening}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGoneError("the client has left")
            return task.result()
        finally:
            for unfinished in (task, listening):
                unfinished.cancel()
            await asyncio.gather(task, listening, return_exceptions=True)

    async def _until_gone(self) -> None:
        while not self.gone:
            await self._next()

    async def _next(self) -> Message:
        if self.gone:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self.gone = message["type"] == "http.disconnect"
        return message
