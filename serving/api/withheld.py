"""A response that is kept until somebody says what becomes of it, message by message as it was made."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send

OUTCOME_HEADER = "x-telltale-outcome"
"""Says how a reply came about that was withheld."""


class WithheldResponse:
    """Stands in the place of ASGI's ``send`` for one attempt.

    Args:
        send: ASGI's own.
        may_pass: asked at every piece of the body: whether nothing has to be withheld any more.

    Attributes:
        passed: whether it has begun to leave, and what comes leaves at once.
    """

    def __init__(self, send: Send, may_pass: Callable[[], bool] = lambda: False) -> None:
        self._send = send
        self._may_pass = may_pass
        self._messages: list[Message] = []
        self.passed = False

    async def __call__(self, message: Message) -> None:
        """Keep a message, or pass it on."""
        if self.passed:
            await self._send(message)
            return
        self._messages.append(message)
        if message["type"] == "http.response.body" and message.get("body") and self._may_pass():
            await self.release()

    async def release(self, outcome: str | None = None) -> None:
        """Send what was kept, as it was made, and whatever follows at once.

        Args:
            outcome: how the reply came about; None if there is nothing to say.
        """
        self.passed = True
        kept, self._messages = self._messages, []
        for message in kept:
            began = message["type"] == "http.response.start"
            await self._send(message if outcome is None or not began else _saying(message, outcome))

    @property
    def status(self) -> int:
        """The HTTP status; 0 if the application has said nothing."""
        return next((int(m["status"]) for m in self._messages if m["type"] == "http.response.start"), 0)

    @property
    def is_stream(self) -> bool:
        """Whether it consists of server-sent events."""
        started = (Headers(raw=m["headers"]) for m in self._messages if m["type"] == "http.response.start")
        return any(headers.get("content-type", "").startswith("text/event-stream") for headers in started)


def _saying(message: Message, outcome: str) -> Message:
    headers = MutableHeaders(raw=list(message["headers"]))
    headers[OUTCOME_HEADER] = outcome
    return {**message, "headers": headers.raw}
