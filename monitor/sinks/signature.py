"""Signatures of webhooks, as Standard Webhooks 1.0 says (https://www.standardwebhooks.com).

What is signed is ``ID.TIMESTAMP.BODY``, with HMAC-SHA256; the signature travels as ``v1,BASE64``. The timestamp is that
of the attempt: a receiver refuses what is older than its window, and what it has seen under the same id.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping

from monitor.sinks.errors import SinkError

ID_HEADER = "webhook-id"
TIMESTAMP_HEADER = "webhook-timestamp"
SIGNATURE_HEADER = "webhook-signature"
WINDOW_SECONDS = 300
"""How far the clocks of sender and receiver, and the way between them, may lie apart."""
_PREFIX = "whsec_"
_SHORTEST, _LONGEST = 24, 64


def parse_secret(text: str, *, where: str) -> bytes:
    """The key that a secret spells.

    Args:
        text: ``whsec_`` and base64; the prefix may be missing.
        where: it comes from, for the message, which never repeats the secret.
    Raises:
        SinkError: it is not base64, or of another length than 24 to 64 bytes.
    """
    try:
        key = base64.b64decode(text.strip().removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not _SHORTEST <= len(key) <= _LONGEST:
        raise SinkError(
            f"{where}: holds no secret; it must be whsec_ and {_SHORTEST} to {_LONGEST} bytes in base64. Make one: "
            'echo "whsec_$(openssl rand -base64 32)".'
        )
    return key


def sign(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """The signature of one attempt.

    Args:
        key: of the sink.
        message_id: the same for every attempt.
        timestamp: seconds since 1970, of this attempt.
        body: as it is sent.
    """
    signed = b".".join((message_id.encode(), str(timestamp).encode(), body))
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


def is_signed(key: bytes, headers: Mapping[str, str], body: bytes, *, now: float) -> bool:
    """Whether a received request is one of ours, sent within the window. For receivers written in Python.

    Args:
        key: of the sink.
        headers: of the request, names in lower case.
        body: as it was received, before it is parsed.
        now: seconds since 1970.
    """
    timestamp = headers.get(TIMESTAMP_HEADER, "")
    if not (timestamp.isascii() and timestamp.isdigit()) or abs(now - int(timestamp)) > WINDOW_SECONDS:
        return False
    wanted = sign(key, headers.get(ID_HEADER, ""), int(timestamp), body)
    given = headers.get(SIGNATURE_HEADER, "").split(" ")
    return any(hmac.compare_digest(wanted.encode(), one.encode()) for one in given)
