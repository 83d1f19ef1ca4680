"""How the outermost layer says no: in OpenAI's shape of an error, and nothing of what is behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from http import HTTPStatus

from starlette.types import Send

from probes.errors import TelltaleError


class Reason(StrEnum):
    """Why a request gets no answer; the error's code, and the label of its metric."""

    STARTING = "starting"
    HEADERS_TOO_LARGE = "headers_too_large"
    INVALID_API_KEY = "invalid_api_key"
    SCOPE_MISSING = "scope_missing"
    NOT_FOUND = "not_found"
    RATE_LIMIT_EXCEEDED = "rate_limit_exceeded"
    BODY_TOO_LARGE = "body_too_large"
    BODY_TIMEOUT = "body_timeout"


class TurnedAwayError(TelltaleError, ValueError):
    """A request that gets no answer.

    Args:
        status: of what is answered instead.
        reason: why, for programs.
        message: why, for people.
        kind: OpenAI's type of the error.
        headers: besides those of every error.
    """

    def __init__(
        self,
        status: HTTPStatus,
        reason: Reason,
        message: str,
        *,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.kind = kind
        self.headers = dict(headers or {})


async def answer(error: TurnedAwayError, send: Send) -> None:
    """Answer with an error, and close the connection: what is left of the request is not read."""
    content = {"message": str(error), "type": error.kind, "param": None, "code": error.reason.value}
    body = json.dumps({"error": content}).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "cache-control": "no-store",
        **error.headers,
    }
    start = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": int(error.status), "headers": start})
    await send({"type": "http.response.body", "body": body})
