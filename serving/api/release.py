"""Holds back what of a response may not leave before the events of its choices are stored."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import Future

from starlette.types import Message, Send

from monitor.audit.settings import OnFull
from serving.api.auditing import Audit
from serving.origin import Origin

PATIENCE_SECONDS = 10.0
_LOOK_SECONDS = 0.25
_ROOM_SECONDS = 0.01
_MESSAGE = (
    "the audit trail cannot be written, and nothing is released that it does not vouch for. Try again later; the "
    "operator finds the reason in the server's log."
)


async def has_room(audit: Audit, patience: float) -> bool:
    """Whether a new request may be taken in: waits while the queue is full and may not be overrun.

    Returns: False where nothing can be stored at present, or nothing could for too long.
    """
    deadline = time.monotonic() + patience
    while True:
        if audit.is_failing:
            return False
        held = audit.settings.on_full is OnFull.BLOCK and audit.writer.is_full and not audit.writer.is_failing
        if not held:
            return True
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_ROOM_SECONDS)


async def refuse(audit: Audit, send: Send) -> None:
    """Answer 503 in the place of everything else."""
    audit.metrics.withheld()
    content = _error()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"retry-after", b"5"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": content})


class HeldResponse:
    """Stands in the place of ASGI's ``send`` for one response.

    Whatever the application sends waits until the events that were handed in so far are stored. If they are not, the
    client gets an error: in the place of the response or, in a stream, as its last event.

    Args:
        audit: whose events are waited for.
        origin: of the request; its tickets are taken from it.
        send: ASGI's own.
        patience: seconds to wait for a ticket.
    """

    def __init__(self, audit: Audit, origin: Origin, send: Send, *, patience: float) -> None:
        self._audit = audit
        self._origin = origin
        self._send = send
        self._patience = patience
        self._began = False
        self._withheld = False

    async def __call__(self, message: Message) -> None:
        """Pass a message on as soon as it may leave."""
        if self._withheld:
            return
        if self._origin.tickets and not await self._stored():
            self._withheld = True
            await self._refuse()
            return
        self._began |= message["type"] == "http.response.start"
        await self._send(message)

    async def _stored(self) -> bool:
        deadline = time.monotonic() + self._patience
        while self._origin.tickets:
            if not await self._is_done(self._origin.tickets[0], deadline):
                return False
            self._origin.tickets.pop(0)
        return True

    async def _is_done(self, ticket: Future[None], deadline: float) -> bool:
        while not ticket.done():
            if self._audit.writer.is_failing and not self._audit.settings.blocks_on_error:
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            # Not `wait_for`: a wait that is given up must not cancel the ticket, which the writer still completes.
            await asyncio.wait({asyncio.wrap_future(ticket)}, timeout=min(left, _LOOK_SECONDS))
        return True

    async def _refuse(self) -> None:
        if not self._began:
            await refuse(self._audit, self._send)
            return
        self._audit.metrics.withheld()
        await self._send({"type": "http.response.body", "body": b"data: " + _error() + b"\n\n"})


def _error() -> bytes:
    error = {"message": _MESSAGE, "type": "server_error", "param": None, "code": "audit_unavailable"}
    return json.dumps({"error": error}).encode()
