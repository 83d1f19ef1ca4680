"""What makes a server read its policy file again, besides a request: SIGHUP, and a change of the file."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import structlog

from monitor.types import ReloadSource
from serving.engine.reloader import Reloader
from serving.engine.runtime import WATCH_VARIABLE

log = structlog.get_logger(__name__)

POLL_SECONDS = 1.0


class Triggers:
    """Listens for both in the event loop of the API process.

    Args:
        reloader: of the server.
        path: of the policy file.
    """

    def __init__(self, reloader: Reloader, path: Path) -> None:
        self._reloader = reloader
        self._path = path
        self._tasks: set[asyncio.Task[Any]] = set()

    def listen(self) -> None:
        """From now on: read the file at each SIGHUP and, if asked to, whenever it has changed."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, lambda: self._start(self._reloader.reload_file(ReloadSource.SIGNAL)))
        if os.environ.get(WATCH_VARIABLE) == "1":
            seen = self._reloader.history.running.text
            self._start(self.watch(hashlib.sha256(seen.encode()).digest()))

    async def watch(self, known: bytes, *, every: float = POLL_SECONDS) -> None:
        """Read the file when it has changed, and has then been the same for a moment.

        Its content is compared, not its time: where files are mounted, links change and times do not.

        Args:
            known: SHA-256 of the content that needs no reading.
            every: seconds between two looks.
        """
        earlier = known
        while True:
            await asyncio.sleep(every)
            now = await asyncio.to_thread(_digest_of, self._path)
            if now is not None and now == earlier and now != known:
                known = now
                await self._reloader.reload_file(ReloadSource.FILE)
            earlier = now or earlier

    def _start(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="telltale-reload")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _digest_of(path: Path) -> bytes | None:
    """None while it cannot be read: it is being replaced."""
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return None
