"""How often a minute something may be done. Knows nothing of what is done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 60.0


class Budget:
    """Counts what was done in the newest minute, exactly.

    Args:
        per_minute: at most so often; None: as often as it takes.
        clock: seconds; never goes back.
    """

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = per_minute
        self._clock = clock
        self._taken: deque[float] = deque()

    def take(self) -> bool:
        """Whether it may be done once more, now; if so, it counts as done."""
        if self._limit is None:
            return True
        now = self._clock()
        while self._taken and now - self._taken[0] >= WINDOW_SECONDS:
            self._taken.popleft()
        if len(self._taken) >= self._limit:
            return False
        self._taken.append(now)
        return True
