"""KV blocks that are nobody else's: where what they hold is not what their tokens say, nobody may find them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class PrivateBlocks:
    """Hashes of a request's KV blocks, those from some position on unlike anybody else's.

    Attributes:
        inner: vLLM's own, which hashes the full blocks that have no hash yet.
        block_size: tokens of what gets one hash.
        start: first position whose row differs from what its tokens say; None while there is none.
        secret: makes hashes differ.
    """

    inner: Callable[[Any], list[Any]]
    block_size: int
    start: int | None = None
    secret: bytes = field(default_factory=lambda: os.urandom(16))

    def __call__(self, request: Any) -> list[Any]:
        """Hashes of the full blocks that have none."""
        known = len(request.block_hashes)
        fresh = self.inner(request)
        if self.start is None:
            return fresh
        return [
            hashlib.sha256(found + self.secret).digest() if (number + 1) * self.block_size > self.start else found
            for number, found in enumerate(fresh, known)
        ]

    def keep_from(self, position: int) -> None:
        """Those from a position on are private."""
        self.start = position if self.start is None else min(self.start, position)
