"""The layer over all routes: says where a request comes from, and refuses bodies that would get past the monitor.

Pure ASGI, so that streams and cancellation pass untouched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.contextvars import bind_contextvars

from monitor.policy import Plan
from probes.card import Format
from serving.api.auditing import Audit
from serving.api.body import read_body
from serving.api.callers import Callers, RefusedCallerError
from serving.api.fields import PRIORITY, REFUSED, refused_field
from serving.api.release import PATIENCE_SECONDS, HeldResponse, has_room, refuse
from serving.api.routes import CHAT_ROUTES, ROUTE_OF_ANY_BODY, is_under
from serving.api.sessions import Sessions, held
from serving.engine.steer_request import STEER_KEY, SteerRequestError
from serving.origin import NOBODY, Origin, enter_origin, leave_origin

RESERVED = "telltale"
XARGS = "vllm_xargs"
_MARKS = (*(word.encode() for word in (STEER_KEY, RESERVED, PRIORITY, *REFUSED)), b"\\u", b"\0")
_POLICY_VIOLATION = 1008
"""WebSocket's code of a connection that may not be."""
_EXTRA_HOLDERS = (
    XARGS,
    "extra_args",
    "sampling_params",
    "extra_body",
    "kv_transfer_params",
    "ec_transfer_params",
)


class MonitorMiddleware:
    """Marks the origin of each HTTP request and checks its body before any handler opens a stream.

    Args:
        app: the application behind it.
        root_path: prefix under which the application is mounted.
        audit: gives the audit trail, once there is one.
        sessions: gives the sessions, once there are some.
        patience: seconds that a request may wait for the audit trail.
        check_xargs: looks at a body's ``vllm_xargs`` and raises what is wrong with the steer that they ask for.
        callers: tell who sends a request; without them it is nobody in particular.
        plan: gives the plan that is in force.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        root_path: str = "",
        check_xargs: Callable[[Mapping[str, Any]], object] | None = None,
        callers: Callers | None = None,
        audit: Callable[[], Audit | None] = lambda: None,
        sessions: Callable[[], Sessions | None] = lambda: None,
        patience: float = PATIENCE_SECONDS,
        plan: Callable[[], Plan | None] = lambda: None,
    ) -> None:
        self._app = app
        self._patience = patience
        self._audit = audit
        self._sessions = sessions
        self._check_xargs = check_xargs
        self._callers = callers or Callers()
        self._plan = plan
        self._root = root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "websocket" and self._callers.ask_for_keys:
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = b""
        if scope["method"] == "POST":
            body, receive = await read_body(receive)
        path = scope["path"].removeprefix(self._root)
        try:
            # Browsers ask by OPTIONS, without a key, what they may send.
            asks = scope["method"] == "OPTIONS"
            caller = NOBODY if asks else self._callers.identify(path, Headers(scope=scope), body)
        except RefusedCallerError as error:
            await _refuse(send, param=error.param, code=error.code, message=str(error), status=error.status)
            return
        plan = self._plan()  # before anything is waited for: its tenants are those who were asked
        if caller.tenant:
            bind_contextvars(tenant=caller.tenant)
        audit = self._audit() if scope["method"] == "POST" else None
        if audit is not None and not await has_room(audit, self._patience):
            await refuse(audit, send)
            return
        sessions = self._sessions() if scope["method"] == "POST" else None
        sitting = await sessions.begin(caller) if sessions is not None else None
        tickets = sitting.tickets if sitting is not None else []
        origin = Origin(_format_of(path, body), caller, sitting, tickets=tickets, plan=plan)
        if audit is not None:
            send = HeldResponse(audit, origin, send, patience=self._patience)
        if sitting is not None:
            send = held(sitting, send)
        token = enter_origin(origin)
        try:
            refused = self._refusal(body)
            if refused is not None:
                param, code, message = refused
                await _refuse(send, param=param, code=code, message=message)
                return
            await self._app(scope, receive, send)
        finally:
            leave_origin(token)

    def _refusal(self, body: bytes) -> tuple[str, str, str] | None:
        """Parameter, code and message of what cannot be answered; None if nothing speaks against it."""
        content = _suspicious(body)
        key = reserved_key(content)
        if key is not None:
            message = f"{key!r} is reserved for the server: a request cannot choose how it is monitored. Leave it out."
            return key, "reserved_key", message
        wrong = self._wrong_steer(content)
        if wrong is not None:
            return XARGS, "steer_refused", wrong
        field = refused_field(content)
        if field is not None:
            name, message = field
            return name, "not_monitored", message
        return None

    def _wrong_steer(self, content: Any) -> str | None:
        xargs = content.get(XARGS) if isinstance(content, dict) else None
        if self._check_xargs is None or not isinstance(xargs, dict):
            return None
        try:
            self._check_xargs(xargs)
        except SteerRequestError as error:
            return str(error)
        return None


def _format_of(path: str, body: bytes) -> Format:
    """Chat where messages go through the template, which the route tells, or for one route the body."""
    if path.rstrip("/") == ROUTE_OF_ANY_BODY:
        content = _parsed(body)
        return Format.CHAT if isinstance(content, dict) and "messages" in content else Format.RAW
    return Format.CHAT if is_under(path, CHAT_ROUTES) else Format.RAW


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
    return _parsed(body)


def _parsed(body: bytes) -> Any:
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


async def _refuse(
    send: Send, *, param: str | None, code: str, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST
) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    content = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status is HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": content})
