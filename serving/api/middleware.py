"""The layer over all routes: says where a request comes from, and refuses bodies that would get past the monitor.

Pure ASGI, so that streams and cancellation pass untouched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from probes.card import Format
from serving.api.auditing import Audit
from serving.api.release import PATIENCE_SECONDS, HeldResponse, has_room, refuse
from serving.engine.steer_request import STEER_KEY, SteerRequestError
from serving.origin import Origin, enter_origin, leave_origin

RESERVED = "telltale"
BEAM_SEARCH = "use_beam_search"
XARGS = "vllm_xargs"
_MARKS = (STEER_KEY.encode(), RESERVED.encode(), BEAM_SEARCH.encode(), b"\\u", b"\0")
_EXTRA_HOLDERS = (
    XARGS,
    "extra_args",
    "sampling_params",
    "extra_body",
    "kv_transfer_params",
    "ec_transfer_params",
)
_CHAT_ROUTES = ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/v2/chat")


class MonitorMiddleware:
    """Marks the origin of each HTTP request and checks its body before any handler opens a stream.

    Args:
        app: the application behind it.
        root_path: prefix under which the application is mounted.
        audit: gives the audit trail, once there is one.
        patience: seconds that a request may wait for the audit trail.
        check_xargs: looks at a body's ``vllm_xargs`` and raises what is wrong with the steer that they ask for.
    """

    def __init__(
        self,
        app: ASGIApp,
        root_path: str = "",
        check_xargs: Callable[[Mapping[str, Any]], object] | None = None,
        audit: Callable[[], Audit | None] = lambda: None,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._app = app
        self._patience = patience
        self._audit = audit
        self._check_xargs = check_xargs
        self._root = root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "POST":
            body, receive = await _read_body(receive)
            content = _suspicious(body)
            key = reserved_key(content)
            if key is not None:
                await _refuse(
                    send,
                    param=key,
                    code="reserved_key",
                    message=f"{key!r} is reserved for the server: a request cannot choose how it is monitored. "
                    "Leave it out.",
                )
                return
            wrong = self._wrong_steer(content)
            if wrong is not None:
                await _refuse(send, param=XARGS, code="steer_refused", message=wrong)
                return
            if isinstance(content, dict) and content.get(BEAM_SEARCH):
                await _refuse(
                    send,
                    param=BEAM_SEARCH,
                    code="not_monitored",
                    message="beam search asks the engine for one token at a time, so that no stream rule would see a "
                    f"reply. It is refused on a monitored server; leave {BEAM_SEARCH!r} out.",
                )
                return
        audit = self._audit() if scope["method"] == "POST" else None
        if audit is not None and not await has_room(audit, self._patience):
            await refuse(audit, send)
            return
        path = scope["path"].removeprefix(self._root)
        chat = any(path == route or path.startswith(f"{route}/") for route in _CHAT_ROUTES)
        origin = Origin(Format.CHAT if chat else Format.RAW)
        if audit is not None:
            send = HeldResponse(audit, origin, send, patience=self._patience)
        token = enter_origin(origin)
        try:
            await self._app(scope, receive, send)
        finally:
            leave_origin(token)

    def _wrong_steer(self, content: Any) -> str | None:
        xargs = content.get(XARGS) if isinstance(content, dict) else None
        if self._check_xargs is None or not isinstance(xargs, dict):
            return None
        try:
            self._check_xargs(xargs)
        except SteerRequestError as error:
            return str(error)
        return None


def reserved_key(content: Any) -> str | None:
    """The first reserved key that a body sets where vLLM would pass it on to the engine, or None."""
    return next(_reserved_in(content), None)


def _suspicious(body: bytes) -> Any:
    """The parsed body if one of our words may stand in it, else None.

    It may stand there plainly, escaped, or in UTF-16 and UTF-32, which JSON allows too. All other bodies are left to
    vLLM's own parser.
    """
    if not any(mark in body.lower() for mark in _MARKS):
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # not JSON, or deeper than the server's own parser goes: vLLM answers that
        return None


def _reserved_in(content: Any) -> Iterator[str]:
    if not isinstance(content, dict):
        return
    waiting: list[tuple[str, Any]] = [(key, content[key]) for key in content if key in _EXTRA_HOLDERS]
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, list):
            waiting.extend((path, child) for child in node)
        elif isinstance(node, dict):
            for key, child in node.items():
                if key.lower().startswith(RESERVED):
                    yield f"{path}.{key}"
                waiting.append((f"{path}.{key}", child))


async def _read_body(receive: Receive) -> tuple[bytes, Receive]:
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


async def _refuse(send: Send, *, param: str, code: str, message: str) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    content = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": content})
