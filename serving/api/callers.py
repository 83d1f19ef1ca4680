"""Who sends a request: told by its API key and its headers. Knows no engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import Scope

from serving.origin import Caller

SESSION_HEADER = "x-telltale-session"
"""What a client calls its session."""


class Callers:
    """Tells who is behind a request.

    An API key counts only if vLLM is told to ask for it: else whoever sends a request could make one up, and be another
    tenant each time.
    """

    def __init__(self) -> None:
        self._keys: frozenset[str] = frozenset()

    def accept(self, keys: Iterable[str]) -> None:
        """These API keys are asked for.

        Args:
            keys: in clear; only their digests are kept.
        """
        self._keys = frozenset(hashlib.sha256(key.encode()).hexdigest() for key in keys)

    def identify(self, scope: Scope) -> Caller:
        """Who sends a request.

        Args:
            scope: of its connection.
        """
        headers = Headers(scope=scope)
        digest = key_digest(headers)
        # Of any length: what goes on is its digest.
        session = headers.get(SESSION_HEADER, "")
        return Caller(
            tenant=f"key:{digest}" if digest in self._keys else "",
            session=hashlib.sha256(session.encode()).hexdigest() if session else "",
        )


def key_digest(headers: Headers) -> str:
    """SHA-256 of a request's API key, hexadecimal; empty if it has none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return hashlib.sha256(key.encode()).hexdigest() if scheme.lower() == "bearer" and key else ""
