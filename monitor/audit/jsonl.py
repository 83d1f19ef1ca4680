"""Records in files, one for each chain, one record a line."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Self

from monitor.audit.errors import AuditStoreError, DamagedError
from monitor.audit.record import AuditRecord
from monitor.audit.store import Store, Stored
from monitor.events import Head, Reference

_SUFFIX = ".jsonl"
_PRIVATE = b',"private":'
_KEYS = ("commitment", "event", "key_id", "mac", "prev", "seq", "writer")


class JsonlStore(Store):
    """Records in a folder. A file is locked as long as its writer runs.

    ``durable``: ``append`` returns when the file is synced, else when the operating system has the lines.
    """

    def __init__(self, folder: Path, *, durable: bool) -> None:
        self._folder = folder
        self._durable = durable
        self._files: dict[str, _ChainFile] = {}

    @classmethod
    def open(cls, url: str, *, durable: bool, make: bool) -> Self:
        """Open a folder, and make it if it is missing and may be made.

        Raises:
            AuditStoreError: there is none.
        """
        folder = Path(url.removeprefix("jsonl:///"))
        try:
            if make:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _failed(folder, "cannot be made", error) from error
        if not folder.is_dir():
            raise AuditStoreError(f"audit store {folder}: there is no such folder. Give the policy's 'audit.url'.")
        return cls(folder, durable=durable)

    def append(self, records: Sequence[AuditRecord]) -> None:
        """See ``Store``."""
        writer = records[0].writer
        path = self._path(writer)
        try:
            if writer not in self._files:
                self._files[writer] = _ChainFile(path)
                _sync_folder(self._folder)
            self._files[writer].append(b"".join(_line(record) for record in records), sync=self._durable)
        except OSError as error:
            raise _failed(path, "cannot be written", error) from error

    def writers(self) -> list[str]:
        """See ``Store``."""
        try:
            began = {path: _began(path) for path in self._folder.glob(f"*{_SUFFIX}")}
        except OSError as error:
            raise _failed(self._folder, "cannot be read", error) from error
        return [path.stem for path in sorted(began, key=lambda path: (began[path], path.name))]

    def newest(self, writer: str) -> Head | None:
        """See ``Store``."""
        last: AuditRecord | None = None
        for stored in self.read(writer):
            last = stored.record
        return Head(writer=writer, seq=last.seq, mac=last.mac) if last is not None else None

    def read(self, writer: str, *, after: int = -1) -> Iterator[Stored]:
        """See ``Store``. A last line without an end was being written when its writer died: nobody was told of it."""
        path = self._path(writer)
        if not path.exists():
            return
        for _, line in _lines(path):
            record = _parse(line, path)
            if record.writer != writer:
                raise DamagedError(f"{path}: holds a record of another chain, {record.writer[:8]}")
            if record.seq > after:
                yield Stored(record)

    def erase(self, records: Sequence[Reference]) -> None:
        """See ``Store``. In place: its writer may go on at the file's end meanwhile."""
        wanted: dict[str, set[int]] = {}
        for record in records:
            wanted.setdefault(record.writer, set()).add(record.seq)
        for writer, numbers in wanted.items():
            path = self._path(writer)
            with _opened(path, "r+b") as file:
                for offset, line in _lines(path):
                    if _parse(line, path).seq in numbers:
                        start = line.rindex(_PRIVATE) + len(_PRIVATE)
                        file.seek(offset + start)
                        file.write(b"null".ljust(len(line) - start - len(b"}\n")))
                file.flush()
                os.fsync(file.fileno())

    def can_prune(self, writer: str) -> bool:
        """See ``Store``. A file that is being written has to wait until its writer has ended."""
        with _opened(self._path(writer), "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def prune(self, writer: str, below: int) -> None:
        """See ``Store``."""
        path = self._path(writer)
        kept = [line for _, line in _lines(path) if _parse(line, path).seq >= below]
        try:
            if kept:
                _replace(path, kept)
            else:
                path.unlink()
        except OSError as error:
            raise _failed(path, "cannot be pruned", error) from error

    def close(self) -> None:
        """See ``Store``."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _path(self, writer: str) -> Path:
        return self._folder / f"{writer}{_SUFFIX}"


class _ChainFile:
    """The file that one writer appends to."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._end = os.fstat(self._descriptor).st_size

    def append(self, data: bytes, *, sync: bool) -> None:
        """Whole, or as if it had not been tried."""
        # What an attempt that failed may have left.
        os.ftruncate(self._descriptor, self._end)
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]
        if sync:
            os.fsync(self._descriptor)
        self._end += len(data)

    def close(self) -> None:
        os.fsync(self._descriptor)
        os.close(self._descriptor)


def _opened(path: Path, mode: str) -> BinaryIO:
    try:
        return path.open(mode)  # type: ignore[return-value] # every mode here is binary
    except OSError as error:
        raise _failed(path, "cannot be opened", error) from error


def _replace(path: Path, lines: Sequence[bytes]) -> None:
    temporary = path.with_suffix(".pruned")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    with _opened(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield offset, line
            offset += len(line)


def _began(path: Path) -> float:
    first = next(_lines(path), None)
    try:
        return Stored(_parse(first[1], path)).event.time.timestamp() if first is not None else 0.0
    except DamagedError:
        return 0.0  # whoever reads it will be told


def _line(record: AuditRecord) -> bytes:
    signed = {name: getattr(record, name) for name in _KEYS}
    head = json.dumps(signed, separators=(",", ":")).encode().removesuffix(b"}")
    private = {"content": record.content, "salt": record.salt} if record.content is not None else None
    return head + _PRIVATE + json.dumps(private, separators=(",", ":")).encode() + b"}\n"


def _parse(line: bytes, path: Path) -> AuditRecord:
    try:
        fields = json.loads(line)
        private = fields.pop("private") or {"salt": None, "content": None}
        if not all(isinstance(fields[name], int if name == "seq" else str) for name in _KEYS):
            raise TypeError("a field has another type")  # noqa: TRY301 - told as what it is, below
        record = AuditRecord(**fields, **private)
        spelled = _line(record)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise DamagedError(f"{path}: holds a line that is no record: {line[:40]!r}...") from error
    # One spelling only, so that no byte can change unseen; what was erased has left spaces.
    if line != spelled and (record.content is not None or line != spelled[:-2].ljust(len(line) - 2) + b"}\n"):
        raise DamagedError(f"{path}: record {record.seq} is not spelled as it was written")
    return record


def _failed(path: Path, what: str, error: OSError) -> AuditStoreError:
    return AuditStoreError(
        f"audit store {path}: {what} ({error.strerror or error}). See that it is writable and that the disk has room."
    )
