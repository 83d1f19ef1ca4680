"""Start ``telltale serve`` (or plain vLLM) as a user does: a process of its own, on a free port of this machine."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS = 300.0
SMALL = (
    "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "134217728", "--max-model-len", "1024",
    "--max-num-seqs", "32", "--served-model-name", "tiny",
)  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    command: Sequence[str], log: Path, *, ready: str = "/ready", environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a server command (without --port) until the block ends; it serves when the block begins.

    Args:
        command: begins with the program.
        log: file for its output.
        ready: path that answers 200 once it serves.
        environment: added to this process's.
    """
    with starting(command, log, environment=environment) as server:
        wait_for(server, ready)
        yield server


@dataclass(frozen=True)
class Refusal:
    """A start that has to fail, and the file of what it says on standard error."""

    process: subprocess.Popen[bytes]
    said: Path

    def message(self) -> str:
        """What it says, in one line, once it has ended as a refusal does."""
        return refusal_in(self.process.wait(START_SECONDS), self.said.read_text())


@contextmanager
def refusing(command: Sequence[str], said: Path, *, environment: Mapping[str, str] | None = None) -> Iterator[Refusal]:
    """Begin a start that has to fail, and go on with something else meanwhile.

    Args:
        command: begins with the program; without --port.
        said: file for its standard error.
        environment: added to this process's.
    """
    with (
        said.open("w") as errors,
        subprocess.Popen(
            [*command, "--port", str(free_port())],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "TELLTALE_STATE": str(said.parent / "state"), **(environment or {})},
        ) as process,
    ):
        yield Refusal(process, said)
        process.terminate()


def refusal_in(code: int, stderr: str) -> str:
    """The message of a start that was refused as it should be: exit code 2, no traceback."""
    assert code == 2, stderr[-3000:]
    assert "Traceback" not in stderr
    return stderr[stderr.index("telltale:") :].replace("\n", " ")


@contextmanager
def starting(command: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """As ``serving``, but it may not serve yet: ``wait_for`` it."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TELLTALE_STATE": str(log.parent / "state"), **(environment or {})},
            start_new_session=True,
        )
    try:
        yield Server(f"http://127.0.0.1:{port}", process, log)
    finally:
        stop(process)


def telltale_command(model: Path, policy: Path, *flags: str) -> list[str]:
    """The command line of a monitored server."""
    return [str(Path(sys.executable).parent / "telltale"), "serve", str(model), "--policy", str(policy), *SMALL, *flags]


def vllm_command(model: Path, *flags: str) -> list[str]:
    """The command line of a plain one."""
    return [str(Path(sys.executable).parent / "vllm"), "serve", str(model), "--host", "127.0.0.1", *SMALL, *flags]


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and its children."""
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=30)


def wait_for(server: Server, ready: str = "/ready", *, trust: ssl.SSLContext | None = None) -> None:
    """Return when a server answers 200 on the path ``ready``; over TLS, ``trust`` says whom to believe."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise AssertionError(
                f"the server ended with {server.process.returncode}:\n{server.log.read_text()[-6000:]}"
            )
        try:
            if httpx.get(server.url + ready, timeout=2, verify=trust or True).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"the server did not become ready:\n{server.log.read_text()[-6000:]}")
