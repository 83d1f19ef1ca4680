"""Servers under test: started, stopped in place while the other one is measured, ended. Knows no request but health.

Linux only: the processes of a server are found in /proc by their session.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import httpx

from serving.bench import BenchError

_START_SECONDS = 600.0
_STOP_SECONDS = 30.0
_PAUSE_SECONDS = 10.0
_POLL_SECONDS = 0.05
_LOG_LINES = 30


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """What to start.

    Attributes:
        name: for people.
        command: without ``--port``.
        environment: all of it.
        ready: path that answers 200 once the server serves.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    ready: str


class Server:
    """A running server, with every process of its session.

    Args:
        name: for people.
        url: where it listens.
        process: leader of a session of its own.
        log: file with its output.
    """

    def __init__(self, name: str, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.url = url
        self._process = process
        self._log = log

    def pause(self) -> None:
        """Stop all its processes where they are (SIGSTOP), and see that none of them runs any more.

        Raises:
            BenchError: one still runs after ten seconds, or the server has ended.
        """
        self.require_alive()
        deadline = time.monotonic() + _PAUSE_SECONDS
        while running := self._running(states="TtZX"):
            if time.monotonic() > deadline:
                raise BenchError(
                    f"{self.name}: process {running[0]} cannot be stopped; its server would disturb the other."
                )
            self._signal(running, signal.SIGSTOP)
            time.sleep(_POLL_SECONDS)

    def resume(self) -> None:
        """Let its processes go on (SIGCONT)."""
        self._signal(self._running(states="ZX"), signal.SIGCONT)

    def end(self) -> None:
        """End it: SIGCONT, SIGTERM, and SIGKILL for what is left of its session after half a minute."""
        try:
            self.resume()
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_STOP_SECONDS)
        finally:
            # Also when a second Ctrl-C cut the wait short: nothing is left behind.
            deadline = time.monotonic() + _STOP_SECONDS
            while (left := self._running(states="ZX")) and time.monotonic() < deadline:
                self._signal(left, signal.SIGKILL)
                time.sleep(_POLL_SECONDS)
            self._process.wait(timeout=_STOP_SECONDS)

    def require_alive(self) -> None:
        """Refuse to go on with a server that has ended.

        Raises:
            BenchError: with its exit status and the end of its log.
        """
        if (status := self._process.poll()) is not None:
            raise self.failure(f"ended with exit status {status}")

    def wait_ready(self, path: str) -> None:
        """Wait until it serves.

        Raises:
            BenchError: it ended, or did not answer 200 in ten minutes.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            self.require_alive()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + path, timeout=5.0, trust_env=False).status_code == httpx.codes.OK:
                    return
            time.sleep(_POLL_SECONDS)
        raise self.failure(f"did not answer {path} with 200 within {_START_SECONDS:.0f} s")

    def failure(self, what: str) -> BenchError:
        """An error about this server, with the end of its log."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        return BenchError(f"{self.name} {what}. The end of its log:\n" + "\n".join(f"  {line}" for line in lines))

    def _running(self, *, states: str) -> list[int]:
        """The processes of the session that are in none of these states (T: stopped, Z, X: dead)."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            # A process may end while its entry is read.
            with contextlib.suppress(OSError):
                # "pid (name) state ppid pgrp session ...", where the name may hold spaces and brackets.
                state, _, _, session, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(session) == self._process.pid and state not in states:
                    found.append(int(entry.name))
        return found

    @staticmethod
    def _signal(processes: Sequence[int], number: signal.Signals) -> None:
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def running(program: Program, folder: Path) -> Iterator[Server]:
    """Run a server until the block ends, whatever ends it.

    Args:
        program: what to start.
        folder: its working directory, where its log goes too.
    Raises:
        BenchError: it does not start, or this is no Linux.
    """
    if not sys.platform.startswith("linux"):
        raise BenchError(
            f"this is {sys.platform}; the benchmark stops the idle server's processes as Linux lists them."
        )
    port = _free_port()
    log = folder / f"{program.name.replace(' ', '-')}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own command line
            [*program.command, "--port", str(port)],
            cwd=folder,
            env=dict(program.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(program.name, f"http://127.0.0.1:{port}", process, log)
    try:
        server.wait_ready(program.ready)
        yield server
    finally:
        server.end()


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that ``finally`` runs."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {
        number: signal.signal(number, interrupt) for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
