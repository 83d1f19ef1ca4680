"""How much one key may send, and how large a request may be."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable

from starlette.types import Message, Receive

BODY_SECONDS = 120.0
"""A body must be there by then: whoever sends a byte now and then would hold the server's memory for ever."""


class TooLargeError(Exception):
    """A body is larger than the server takes."""


class Buckets:
    """A token bucket for each key (Turner 1986): full at first, filled at its rate, never above one minute's worth.

    There is one for each name that was ever given to ``take``, and no other: give it names of known keys only.

    Args:
        clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._filled: dict[str, tuple[float, float]] = {}

    def take(self, name: str, per_minute: int) -> float:
        """Let one request of a key through if its bucket is not empty.

        Args:
            name: of the bucket.
            per_minute: requests, and the most that may come at once.
        Returns: 0.0 if it may pass, else the seconds until one may.
        """
        now = self._clock()
        level, then = self._filled.get(name, (float(per_minute), now))
        level = min(float(per_minute), level + (now - then) * per_minute / 60.0)
        passes = level >= 1.0
        self._filled[name] = (level - passes, now)
        return 0.0 if passes else (1.0 - level) * 60.0 / per_minute

    def keep(self, names: Iterable[str]) -> None:
        """Forget all others: keys that are no longer known."""
        known = set(names)
        self._filled = {name: state for name, state in self._filled.items() if name in known}


def retry_after(seconds: float) -> str:
    """The value of the header Retry-After: whole seconds, at least one."""
    return str(max(1, math.ceil(seconds)))


async def read_body(receive: Receive, limit: int, *, said: int = 0, patience: float = BODY_SECONDS) -> Receive:
    """Read a whole body before anything is done for it.

    Args:
        receive: of the connection.
        limit: bytes; counted as they come, whatever the client says beforehand.
        said: bytes, by its header Content-Length; if that is too many, nothing is read.
        patience: seconds for all of it.
    Returns: gives the same body once more, then what else comes.
    Raises:
        TooLargeError: it is larger.
        TimeoutError: it took too long.
    """
    if said > limit:
        raise TooLargeError
    messages: list[Message] = []
    size = 0
    async with asyncio.timeout(patience):
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > limit:
                raise TooLargeError
            if message["type"] != "http.request" or not message.get("more_body", False):
                break
    replayed = iter(messages)

    async def replay() -> Message:
        return next(replayed, None) or await receive()

    return replay
