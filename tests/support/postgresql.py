"""A PostgreSQL server of a test's own: Debian's binaries, a fresh cluster, a free port of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.server import free_port

_START_SECONDS = "60"


@dataclass(frozen=True)
class Cluster:
    """A running server.

    Attributes:
        url: of its database, without a password: only this machine's users are let in.
    """

    url: str
    _bin: Path
    _data: Path
    _options: str
    _user: str | None

    def stop(self) -> None:
        """Kill it at once, as a power cut would; the files are left as they are."""
        self._control("stop", "-m", "immediate")

    def start(self) -> None:
        """Start it, again or for the first time."""
        self._control("start", "-t", _START_SECONDS, "-o", self._options, "-l", str(self._data / "log"))

    def _control(self, *arguments: str) -> None:
        subprocess.run(
            [self._bin / "pg_ctl", "-D", self._data, "-w", *arguments],
            user=self._user,
            cwd=self._data,
            check=True,
            stdout=subprocess.DEVNULL,
        )


@contextmanager
def postgresql() -> Iterator[Cluster]:
    """A fresh cluster, until the block ends.

    PostgreSQL refuses to run as root: there it runs as its own user. Its folder is no fixture's, which others than the
    owner cannot enter.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    assert found, "PostgreSQL is not installed: run make test-services"
    user = "postgres" if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="telltale-postgresql-") as folder:
        if user is not None:
            shutil.chown(folder, user)
        data, port = Path(folder) / "data", free_port()
        initdb = [found[-1] / "initdb", "-D", data, "-U", "telltale", "--auth", "trust"]
        subprocess.run(initdb, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        options = f"-h 127.0.0.1 -p {port} -k {folder}"
        cluster = Cluster(f"postgresql://telltale@127.0.0.1:{port}/postgres", found[-1], data, options, user)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
