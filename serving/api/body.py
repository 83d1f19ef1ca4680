"""Reads a request's body, and leaves it to be read again."""

from __future__ import annotations

from starlette.types import Message, Receive


async def read_body(receive: Receive) -> tuple[bytes, Receive]:
    """The whole body, and what to hand on in the place of ``receive``."""
    messages: list[Message] = []
    parts = []
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    replayed = iter(messages)

    async def replay() -> Message:
        return next(replayed, None) or await receive()

    return b"".join(parts), replay
