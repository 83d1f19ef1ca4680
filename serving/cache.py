"""A cache folder that is built once, whole or not at all, and checked at each use; knows nothing of what is in it.

The folder is built beside its final place, synced and renamed. Its manifest holds the size, time stamp and SHA-256 of
every file: where size and time stamp still hold, a file is taken as unchanged. One process builds, others wait.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from probes.errors import TelltaleError

__all__ = ["CacheError", "CachedFolder", "file_sha256"]

_MANIFEST = "manifest.json"
_MANIFEST_VERSION = 1
_SMALL_FILE_BYTES = 1 << 20
_LOCK_TIMEOUT_SECONDS = 900.0
_LOCK_POLL_SECONDS = 0.1
_CHUNK_BYTES = 1 << 20


class CacheError(TelltaleError, OSError):
    """The cache folder cannot be used; the text says what to change."""


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedFolder:
    """One folder of the cache.

    Args:
        path: the folder; its parent holds the lock and the folder under construction.
        source: what it is made from and how, as one string; a folder made from another source is rebuilt.
        build: fills an empty folder; may raise, then nothing is kept.
        bytes_needed: free disk space without which a build is not begun.
        progress: told, one line each time, when something takes a while.
    """

    path: Path
    source: str
    build: Callable[[Path], None]
    bytes_needed: int = 0
    progress: Callable[[str], None]

    def ensure(self, *, verify: bool = False) -> Mapping[str, str]:
        """Build the folder unless a sound one is there.

        Args:
            verify: compute the SHA-256 of every file again, whatever the time stamps say.

        Returns: the SHA-256 of every file, by name.
        Raises: CacheError if the place cannot be written or another process holds it for too long.
        """
        try:
            if self._fault(verify=verify) is None:
                return self._digests()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock():
                # Whoever held the lock before us may have built it.
                fault = self._fault(verify=verify)
                if fault is not None:
                    if self.path.exists():
                        self.progress(f"{self.path}: {fault}; building it again")
                    self._rebuild()
        except OSError as error:
            if isinstance(error, TelltaleError):
                raise
            raise CacheError(
                f"cache folder {self.path.parent}: {error.strerror or error}. A writable folder on a disk with "
                f"{self.bytes_needed // 1_000_000} MB free is needed; set TELLTALE_CACHE to one."
            ) from error
        return self._digests()

    def _digests(self) -> Mapping[str, str]:
        manifest = json.loads((self.path / _MANIFEST).read_text(encoding="utf-8"))
        return {name: str(entry["sha256"]) for name, entry in manifest["files"].items()}

    def _fault(self, *, verify: bool) -> str | None:
        """What is wrong with the folder, or None."""
        try:
            manifest = json.loads((self.path / _MANIFEST).read_text(encoding="utf-8"))
            if manifest["version"] != _MANIFEST_VERSION or manifest["source"] != self.source:
                return "it was made from another source"
            entries: dict[str, dict[str, str | int]] = manifest["files"]
            if not entries:
                return "its manifest lists no file"
            for name, entry in entries.items():
                if not self._is_sound(name, entry, verify=verify):
                    return f"{name} has changed since it was written"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            return f"{_MANIFEST} cannot be read"
        return None

    def _is_sound(self, name: str, entry: Mapping[str, str | int], *, verify: bool) -> bool:
        path = self.path / name
        stat = path.stat()
        if stat.st_size != entry["size"]:
            return False
        unchanged = stat.st_mtime_ns == entry["mtime_ns"]
        if unchanged and not verify and stat.st_size > _SMALL_FILE_BYTES:
            return True
        if stat.st_size > _SMALL_FILE_BYTES:
            self.progress(f"checking {path}")
        return file_sha256(path) == entry["sha256"]

    def _rebuild(self) -> None:
        self._remove_leftovers()
        free = shutil.disk_usage(self.path.parent).free
        if free < self.bytes_needed:
            raise CacheError(
                f"cache folder {self.path.parent}: {free // 1_000_000} MB are free and "
                f"{self.bytes_needed // 1_000_000} MB are needed. "
                "Make room, or set TELLTALE_CACHE to a folder on another disk."
            )
        fresh = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.building-", dir=self.path.parent))
        try:
            self.build(fresh)
            self._write_manifest(fresh)
            # mkdtemp makes it private; the cache is read like any other folder of the user's.
            fresh.chmod(0o755)
            if self.path.exists():
                # A running process may have the old files mapped: move them aside, then drop the names.
                aside = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.old-", dir=self.path.parent))
                self.path.rename(aside / "folder")
            fresh.rename(self.path)
            _sync(self.path.parent)
        finally:
            self._remove_leftovers()

    def _write_manifest(self, folder: Path) -> None:
        files: dict[str, dict[str, str | int]] = {}
        for path in sorted(folder.iterdir()):
            path.chmod(0o644)
            _sync(path)
            stat = path.stat()
            files[path.name] = {"sha256": file_sha256(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        manifest = {"version": _MANIFEST_VERSION, "source": self.source, "files": files}
        path = folder / _MANIFEST
        path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _sync(path)
        _sync(folder)

    def _remove_leftovers(self) -> None:
        """Drop what a killed process left; called with the lock held only."""
        for kind in ("building", "old"):
            for leftover in self.path.parent.glob(f".{self.path.name}.{kind}-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the folder's lock; the system frees it if the process dies."""
        lock_path = self.path.parent / f".{self.path.name}.lock"
        with lock_path.open("a+", encoding="utf-8") as stream:
            deadline = time.monotonic() + _LOCK_TIMEOUT_SECONDS
            waiting = False
            while not _try_lock(stream.fileno()):
                if not waiting:
                    self.progress(f"another process is building {self.path}; waiting for it")
                    waiting = True
                if time.monotonic() > deadline:
                    raise CacheError(
                        f"cache folder {self.path}: another process has been building it for more than "
                        f"{_LOCK_TIMEOUT_SECONDS:.0f} seconds. See who holds {lock_path}, end it, and start again."
                    )
                time.sleep(_LOCK_POLL_SECONDS)
            yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
