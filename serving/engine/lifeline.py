"""Ends the API process, with an error, when its engine has ended: a server without an engine answers nothing."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any

import structlog

log = structlog.get_logger(__name__)

EXIT_ENGINE_ENDED = 3
GRACE_SECONDS = 6.0
"""For clients to be told; vLLM's own watchdog looks every five seconds and stops listening."""
_LOOK_SECONDS = 0.25


def _exit() -> None:
    sys.stderr.write("telltale: the engine ended unexpectedly; see the log above. The server stops.\n")
    sys.stderr.flush()
    # vLLM's own way out would end with 0, which no supervisor restarts.
    os._exit(EXIT_ENGINE_ENDED)


class Lifeline:
    """Between an API process and its engine.

    Args:
        engine: vLLM's ``AsyncLLM``; its ``shutdown`` is wrapped, to tell an end that was asked for from any other.
        ended: called at once when the engine has ended by itself.
        leave: ends the process with an exit code other than 0.
        grace: seconds between the two.
    """

    def __init__(
        self,
        engine: Any,
        *,
        ended: Callable[[], None],
        leave: Callable[[], None] = _exit,
        grace: float = GRACE_SECONDS,
    ) -> None:
        self._engine = engine
        self._ended = ended
        self._leave = leave
        self._grace = grace
        self._asked_for = False
        self._shutdown = engine.shutdown
        engine.shutdown = self._note_shutdown

    async def watch(self) -> None:
        """Wait until the engine ends. If nobody asked it to, let clients have their errors, then end the process."""
        try:
            while not self._engine.errored:
                await asyncio.sleep(_LOOK_SECONDS)
            if self._asked_for:
                return
            log.critical("the engine has ended")
            self._ended()
            await asyncio.sleep(self._grace)
        finally:
            # Also where vLLM is quicker than the grace and cancels this task on its way out.
            if self._engine.errored and not self._asked_for:
                self._leave()

    def _note_shutdown(self, *args: Any, **kwargs: Any) -> Any:
        if not self._engine.errored:
            self._asked_for = True
        return self._shutdown(*args, **kwargs)
