"""Ends the API process, with an error, when its engine has ended: a server without an engine answers nothing."""

from __future__ import annotations

import asyncio
import os
import select
import sys
from collections.abc import Callable
from typing import Any

import structlog

log = structlog.get_logger(__name__)

EXIT_ENGINE_ENDED = 3
GRACE_SECONDS = 5.0
"""How long clients, load balancers and probes are still told that the engine is gone."""
DRAIN_SECONDS = 1.0
"""For those that connected before the server stopped listening: they have their error in milliseconds."""
_LOOK_SECONDS = 0.25
_LOOKS = 1000
"""At a queue that stays full, as where no file descriptor is left for whoever stands in it."""


def _exit() -> None:
    sys.stderr.write("telltale: the engine ended unexpectedly; see the log above. The server stops.\n")
    sys.stderr.flush()
    # vLLM's own way out would end with 0, which no supervisor restarts.
    os._exit(EXIT_ENGINE_ENDED)


async def _stop_listening(listener: asyncio.Server) -> None:
    """Close sockets while nobody stands in their queues: whoever does is cut off by it."""
    queues = select.poll()
    for sock in listener.sockets:
        queues.register(sock.fileno(), select.POLLIN)
    for _ in range(_LOOKS):
        if not queues.poll(0):
            break
        await asyncio.sleep(0)  # the loop lets them in
    listener.close()


class Lifeline:
    """Between an API process and its engine.

    vLLM alone stops its HTTP server with the first request that failed, and whoever has connected and not yet been
    read is then cut off without an answer. ``telltale serve`` tells vLLM to stay, and leaves by itself: last of all,
    so that each client is told, or finds nobody listening.

    Args:
        engine: vLLM's ``AsyncLLM``; its ``shutdown`` is wrapped, to tell an end that was asked for from any other.
        server: gives uvicorn's ``Server``, once it serves.
        ended: called at once when the engine has ended by itself.
        leave: ends the process with an exit code other than 0.
        grace: seconds between the engine's end and the last moment at which the server listens.
        drain: seconds for what has connected until then, and once more for connections that are kept open.
    """

    def __init__(
        self,
        engine: Any,
        server: Callable[[], Any],
        *,
        ended: Callable[[], None],
        leave: Callable[[], None] = _exit,
        grace: float = GRACE_SECONDS,
        drain: float = DRAIN_SECONDS,
    ) -> None:
        self._engine = engine
        self._server = server
        self._ended = ended
        self._leave = leave
        self._grace = grace
        self._drain = drain
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
            for listener in self._server().servers:
                await _stop_listening(listener)
            await asyncio.sleep(self._drain)
            # Now uvicorn closes connections that are kept open, each behind the answer that it is giving.
            self._server().should_exit = True
            await asyncio.sleep(self._drain)
        finally:
            # Also where the server is told to stop meanwhile and cancels this task on its way out.
            if self._engine.errored and not self._asked_for:
                self._leave()

    def _note_shutdown(self, *args: Any, **kwargs: Any) -> Any:
        if not self._engine.errored:
            self._asked_for = True
        return self._shutdown(*args, **kwargs)
