"""How vLLM's processes wait for one another on a CPU: asleep, so that the engine hears what is said to it meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

# Shorter than the 50 us by which Linux rounds a sleep up, and than any step of a model on a CPU by a hundred times.
SLEEP_SECONDS = 20e-6


def asleep(original: Callable[[], None]) -> Callable[[], None]:
    """What to call in the place of ``sched_yield`` between two looks at a message queue.

    While a step is computed, the engine's main thread looks thousands of times a second, and gives up Python's lock for
    a microsecond at each look. The thread that receives requests, control messages and aborts waits for that lock: it
    is woken each time and comes too late each time, unless a core lies idle. With two cores, new requests stood there
    until a running one had ended; a canary or a new policy would stand there, too.

    Args:
        original: ``sched_yield``; on a GPU, where a step is not paid with cores, it stays.
    """
    del original

    def wait() -> None:
        time.sleep(SLEEP_SECONDS)

    return wait
