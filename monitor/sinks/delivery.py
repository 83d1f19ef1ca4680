"""One attempt to deliver a message over HTTP. Tries nothing again, follows nothing, reads no long body."""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from pathlib import Path

import httpx2
import structlog

import monitor.sinks.signature as signatures
from monitor.sinks.errors import SinkError
from monitor.sinks.message import Message

log = structlog.get_logger(__name__)

_WORTH_ANOTHER_TRY = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
_AGENT = "telltale-sink"
_BODY_BYTES = 16384
_BODY_SECONDS = 1.0
"""For what comes in pieces; a single piece may take as long as any answer."""


class Failure(StrEnum):
    """Why an attempt failed."""

    TIMEOUT = "timeout"
    CONNECTION = "connection"
    """Refused, cut off, not found, or its certificate does not hold."""
    REDIRECT = "redirect"
    REFUSED = "refused"
    """4xx: it will be refused again."""
    OVERLOADED = "overloaded"
    """408, 425, 429, and 503 with a time."""
    SERVER_ERROR = "server_error"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an attempt.

    Attributes:
        failure: why it failed; None: delivered.
        detail: for people; holds no URL and no secret.
        retry: whether another attempt may help.
        after_seconds: how long the receiver asks to be left alone.
    """

    failure: Failure | None = None
    detail: str = "delivered"
    retry: bool = False
    after_seconds: float = 0.0


class Delivery:
    """Sends to one address.

    Certificates are verified, redirects are not followed: events go where the operator said, and nowhere else. What the
    environment says of proxies holds (HTTPS_PROXY, NO_PROXY).

    Args:
        url: of the receiver.
        key: to sign with; None: nothing is signed.
        timeout_seconds: for connecting, sending and waiting for an answer, each.
        ca_file: PEM file of authorities in the place of the system's.
    Raises:
        SinkError: the file of authorities cannot be read.
    """

    def __init__(self, url: str, key: bytes | None, *, timeout_seconds: float, ca_file: Path | None = None) -> None:
        self._url = url
        self._key = key
        try:
            context = ssl.create_default_context(cafile=ca_file)
        except OSError as error:
            raise SinkError(f"ca_file {ca_file}: cannot be read ({error}). Give a PEM file of certificates.") from error
        self._client = httpx2.Client(verify=context, timeout=timeout_seconds, follow_redirects=False)

    def attempt(self, message: Message) -> Outcome:
        """Send a message once."""
        headers = {"content-type": "application/json", "user-agent": _AGENT}
        if self._key is not None:
            now = int(time.time())
            headers[signatures.ID_HEADER] = message.id
            headers[signatures.TIMESTAMP_HEADER] = str(now)
            headers[signatures.SIGNATURE_HEADER] = signatures.sign(self._key, message.id, now, message.body)
        try:
            with self._client.stream("POST", self._url, content=message.body, headers=headers) as response:
                outcome = _outcome(response)
                self._read_off(response)
                return outcome
        except httpx2.TimeoutException as error:
            return Outcome(Failure.TIMEOUT, type(error).__name__, retry=True)
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            return Outcome(Failure.CONNECTION, type(error).__name__, retry=True)

    def _read_off(self, response: httpx2.Response) -> None:
        """Read what follows the head, as long as it is short: only then can the connection be used again."""
        until, size = time.monotonic() + _BODY_SECONDS, 0
        try:
            for piece in response.iter_raw():
                size += len(piece)
                if size > _BODY_BYTES or time.monotonic() > until:
                    return
        except httpx2.TransportError as error:
            # The answer has been given, and is what counts.
            log.debug("the body of a receiver's answer broke off", reason=type(error).__name__)

    def close(self) -> None:
        """Give connections back."""
        self._client.close()


def _outcome(response: httpx2.Response) -> Outcome:
    status, detail = response.status_code, f"status {response.status_code}"
    if response.is_success:
        return Outcome()
    if response.has_redirect_location or response.is_redirect:
        return Outcome(Failure.REDIRECT, detail)
    if status in _WORTH_ANOTHER_TRY or (status == HTTPStatus.SERVICE_UNAVAILABLE and "retry-after" in response.headers):
        return Outcome(Failure.OVERLOADED, detail, retry=True, after_seconds=_asked(response))
    if response.is_server_error:
        return Outcome(Failure.SERVER_ERROR, detail, retry=True)
    return Outcome(Failure.REFUSED, detail)


def _asked(response: httpx2.Response) -> float:
    """Seconds of ``Retry-After``; the form with a date is seldom, and counts as none."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdigit() else 0.0
