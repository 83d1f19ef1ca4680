"""The outermost layer: who gets an answer at all, on every path, before anything else has looked at a request.

Pure ASGI. It is closed until it is told the keys. What it keeps of a key is a digest.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from monitor.access import Access, Door, KeyScope
from serving.api.callers import key_of
from serving.api.keyring import Holder, KeyRing
from serving.api.limits import Buckets, TooLargeError, read_body, retry_after
from serving.api.paths import Need, need_of, path_in
from serving.api.refusal import Reason, TurnedAwayError, answer

_ANYBODY = "anybody"
"""The one bucket of all who send no known key, where they get answers."""
_PROXIES = ("forwarded", "via", "x-forwarded-for", "x-real-ip")
"""Headers that tell of a request which a proxy passed on."""
_POLICY_VIOLATION = 1008
_UNASKED_BYTES = 1024
"""Largest body where nobody is asked for a key: nothing there reads one."""


class _Rules(NamedTuple):
    """What the gate goes by, exchanged as one."""

    access: Access
    ring: KeyRing
    open_inference: bool
    open_metrics: bool | None


class Gate:
    """Who may pass, of one process."""

    def __init__(self) -> None:
        self._rules: _Rules | None = None
        self._buckets = Buckets()
        self.turned_away: Callable[[Reason], None] = _uncounted
        """Told of each request that gets no answer."""

    def accept(self, access: Access, ring: KeyRing, *, local: bool) -> None:
        """Open the server, or go on with other keys.

        Args:
            access: of the policy file.
            ring: all keys.
            local: whether the server listens on this machine's own address alone.
        """
        metrics = access.metrics is Door.OPEN if access.metrics is not None else (None if local else False)
        keyed = access.inference is Door.KEYED or ring.has(KeyScope.INFER)
        self._buckets.keep([_ANYBODY, *ring.digests])
        self._rules = _Rules(access, ring, not keyed, metrics)

    def admit(self, scope: Scope) -> int:
        """Let a request pass.

        Args:
            scope: of its connection.
        Returns: bytes that its body may have.
        Raises:
            TurnedAwayError: what is answered instead.
        """
        rules = self._rules
        if rules is None:
            raise TurnedAwayError(
                HTTPStatus.SERVICE_UNAVAILABLE, Reason.STARTING, "this server is starting. Try again later."
            )
        headers, method = Headers(scope=scope), str(scope["method"])
        _require_small(headers, rules.access.header_bytes)
        # Browsers ask so, without a key, what they may send; the layer for it answers, and no route.
        if method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers:
            return _UNASKED_BYTES
        need = need_of(method, path_in(scope))
        if need is Need.NOTHING:
            return _UNASKED_BYTES
        holder = rules.ring.holder_of(key_of(headers))
        if holder is None and not _open_to_all(rules, need, headers):
            raise TurnedAwayError(
                HTTPStatus.UNAUTHORIZED,
                Reason.INVALID_API_KEY,
                "this server answers requests with one of its API keys. Send yours as 'Authorization: Bearer KEY'.",
                headers={"www-authenticate": "Bearer"},
            )
        self._charge(rules, holder)
        if need is None or need is Need.CLOSED:
            raise TurnedAwayError(HTTPStatus.NOT_FOUND, Reason.NOT_FOUND, "there is nothing under this path.")
        if holder is not None and not need.scopes & holder.scopes and not _open_to_all(rules, need, headers):
            raise TurnedAwayError(
                HTTPStatus.FORBIDDEN,
                Reason.SCOPE_MISSING,
                f"this needs an API key with the scope {' or '.join(sorted(need.scopes))}, which yours has not.",
            )
        return rules.access.body_bytes

    def _charge(self, rules: _Rules, holder: Holder | None) -> None:
        own = holder.requests_per_minute if holder is not None else None
        limit = own if own is not None else rules.access.requests_per_minute
        if limit is None:
            return
        wait = self._buckets.take(holder.digest if holder is not None else _ANYBODY, limit)
        if wait > 0.0:
            raise TurnedAwayError(
                HTTPStatus.TOO_MANY_REQUESTS,
                Reason.RATE_LIMIT_EXCEEDED,
                f"more than {limit} requests in a minute. Try again in {retry_after(wait)} s.",
                kind="requests",
                headers={"retry-after": retry_after(wait)},
            )


class AccessLayer:
    """Puts a gate before an application.

    Args:
        app: behind it.
        gate: that is asked.
    """

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "websocket":  # none is monitored
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            limit = self._gate.admit(scope)
            receive = await _limited(Headers(scope=scope), receive, limit)
        except TurnedAwayError as error:
            self._gate.turned_away(error.reason)
            await answer(error, send)
            return
        await self._app(scope, receive, send)


def put_before(app: FastAPI, gate: Gate) -> None:
    """Put a gate before everything that an application is or will be made of.

    Middleware that is added later lies outside of what was added before; this lies outside of all of it.
    """
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: AccessLayer(build(), gate)  # type: ignore[method-assign]


async def _limited(headers: Headers, receive: Receive, limit: int) -> Receive:
    length = headers.get("content-length", "")
    try:
        return await read_body(receive, limit, said=int(length[:20]) if length.isdecimal() else 0)
    except TooLargeError:
        raise TurnedAwayError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            Reason.BODY_TOO_LARGE,
            f"the body is larger than {limit} bytes, which is what this server takes. Send less at once.",
        ) from None
    except TimeoutError:
        raise TurnedAwayError(
            HTTPStatus.REQUEST_TIMEOUT, Reason.BODY_TIMEOUT, "the body did not arrive in time. Send it faster, or less."
        ) from None


def _uncounted(reason: Reason) -> None:
    """Until there are metrics."""


def _open_to_all(rules: _Rules, need: Need | None, headers: Headers) -> bool:
    """Whether a path answers without a key; of one that is not served, as of one that asks the model."""
    if need is Need.METRICS:
        # Behind a proxy of the same machine, all the world comes from the loopback address.
        proxied = any(name in headers for name in _PROXIES)
        return rules.open_metrics if rules.open_metrics is not None else not proxied
    return rules.open_inference and need in {Need.INFER, Need.ANY_KEY, Need.CLOSED, None}


def _require_small(headers: Headers, limit: int) -> None:
    if sum(len(name) + len(value) for name, value in headers.raw) > limit:
        raise TurnedAwayError(
            HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            Reason.HEADERS_TOO_LARGE,
            f"the headers are larger than {limit} bytes, which is what this server takes.",
        )
