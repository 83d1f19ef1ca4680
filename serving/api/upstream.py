"""Passes a request on to another server with OpenAI's API, and its reply back. Nothing of that reply is read here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from http import HTTPStatus

import httpx
import structlog
from starlette.types import Send

from monitor.handling import Handling
from probes.errors import TelltaleError
from serving.api.rewriting import RewriteError, parsed
from serving.api.withheld import OUTCOME_HEADER

log = structlog.get_logger(__name__)

_OPENAI_ROOT = "/v1/"
_OWN_KEYS = ("vllm_xargs",)
"""What means something to this server alone."""
_MAX_REPLY = 64 * 1024 * 1024
_MAX_CONNECTIONS = 128
_EVENTS = "text/event-stream"
_BROKEN = b'data: {"error": {"message": "the reply broke off", "type": "server_error", "code": "upstream_failed"}}\n\n'


class UpstreamError(TelltaleError, RuntimeError):
    """The other server gave no reply, and nothing has been sent to the client."""


class Upstream:
    """Asks other servers: once, without redirects or a proxy from the environment; certificates are verified.

    Args:
        environment: where API keys stand.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        self._client = httpx.AsyncClient(
            follow_redirects=False, trust_env=False, limits=httpx.Limits(max_connections=_MAX_CONNECTIONS)
        )

    async def pass_on(self, path: str, body: bytes, handling: Handling, send: Send, outcome: str) -> None:
        """Have a request answered there.

        Args:
            path: of the route.
            body: of the request.
            handling: says where, under which model name, with which key, and how long to wait for each piece.
            send: ASGI's own.
            outcome: how the reply came about.
        Raises:
            UpstreamError: there is no reply.
        """
        to = handling.to
        if not path.startswith(_OPENAI_ROOT):
            raise UpstreamError(f"{path} is no route of OpenAI's API")
        try:
            content = {key: value for key, value in parsed(body).items() if key not in _OWN_KEYS}
        except RewriteError as error:
            raise UpstreamError(str(error)) from error
        if to.model is not None:
            content["model"] = to.model
        headers = {"accept-encoding": "identity"}
        if to.key_env is not None:
            headers["authorization"] = f"Bearer {self._environment.get(to.key_env, '')}"
        began = False
        url = f"{to.upstream}/{path.removeprefix(_OPENAI_ROOT)}"
        try:
            async with self._client.stream(
                "POST", url, json=content, headers=headers, timeout=handling.timeout
            ) as response:
                if response.status_code != HTTPStatus.OK:
                    raise UpstreamError(f"{url} answered with status {response.status_code}")
                kind = response.headers.get("content-type", "application/json")
                if not kind.startswith(_EVENTS):
                    await _send_whole(send, await _read(response, url), outcome)
                    return
                began = True
                await send(_start(_EVENTS, outcome))
                async for part in response.aiter_bytes():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        except httpx.HTTPError as error:
            if not began:
                raise UpstreamError(f"{url}: {type(error).__name__}") from error
            log.warning("a reply of another server broke off", url=url, why=type(error).__name__)
            await send({"type": "http.response.body", "body": _BROKEN, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _read(response: httpx.Response, url: str) -> bytes:
    found = b""
    async for part in response.aiter_bytes():
        found += part
        if len(found) > _MAX_REPLY:
            raise UpstreamError(f"{url} answered more than {_MAX_REPLY} bytes")
    try:
        json.loads(found)
    except (ValueError, RecursionError) as error:
        raise UpstreamError(f"{url} answered no JSON") from error
    return found


async def _send_whole(send: Send, body: bytes, outcome: str) -> None:
    await send(_start("application/json", outcome, length=len(body)))
    await send({"type": "http.response.body", "body": body})


def _start(kind: str, outcome: str, *, length: int | None = None) -> dict[str, object]:
    headers = [(b"content-type", kind.encode()), (OUTCOME_HEADER.encode(), outcome.encode())]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": int(HTTPStatus.OK), "headers": headers}
