"""The outermost layer: gives each request an id by which its logs, its response and its events are found."""

from __future__ import annotations

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, unbind_contextvars

HEADER = "x-request-id"
_LONGEST = 128


class RequestIds:
    """Binds ``request_id`` to what is logged while a request is served, and sends it back in ``X-Request-Id``.

    A client's own id is taken if it is printable ASCII of at most 128 characters; vLLM makes of it the id of the
    response. Clients may choose the same one twice: nothing but logs and traces rests on it.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _is_usable(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        headers = [(name, value) for name, value in scope["headers"] if name.lower() != HEADER.encode()]
        scope = {**scope, "headers": [*headers, (HEADER.encode(), request_id.encode())]}
        bind_contextvars(request_id=request_id)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            # The tenant is bound further inside, once it is known.
            unbind_contextvars("request_id", "tenant")


def _is_usable(given: str) -> bool:
    return 0 < len(given) <= _LONGEST and given.isascii() and given.isprintable()
