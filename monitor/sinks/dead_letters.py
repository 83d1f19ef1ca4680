"""Messages that could not be delivered, kept in a file of JSON lines until they are sent again."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from monitor.sinks.errors import SinkError


class DeadLetter(BaseModel):
    """A message that was given up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: UUID = Field(default_factory=uuid4, description="of this letter")
    sink: str
    id: str = Field(description="of the message")
    body: str = Field(description="as it was to be sent: texts only if the sink may have them")
    reason: str = Field(description="of the last failure")
    tries: int = Field(ge=0)
    time: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))


class DeadLetters:
    """The file; several processes may use it at once. Only its owner can read it.

    Args:
        path: made with the first letter.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, letters: Sequence[DeadLetter]) -> None:
        """Add letters.

        Raises:
            OSError: the file cannot be written.
        """
        with self._locked() as file:
            _write(file, letters)

    def all(self) -> list[DeadLetter]:
        """What is there, the oldest first.

        Raises:
            SinkError: the file is damaged.
            OSError: it cannot be read.
        """
        if not self._path.exists():
            return []
        with self._locked() as file:
            return self._read(file)

    def remove(self, keys: Collection[UUID]) -> None:
        """Take letters out: the file is replaced as a whole, so that a crash leaves the old one or the new one.

        Raises:
            SinkError: the file is damaged; nothing is taken out.
            OSError: it cannot be written.
        """
        with self._locked() as file:
            left = [letter for letter in self._read(file) if letter.key not in keys]
            fresh = self._path.with_name(f"{self._path.name}.new")
            new = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                _write(new, left)
            finally:
                os.close(new)
            fresh.replace(self._path)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                # While we waited, somebody may have put another file in its place.
                if self._path.exists() and os.path.samestat(os.fstat(file), self._path.stat()):
                    yield file
                    return
            finally:
                os.close(file)

    def _read(self, file: int) -> list[DeadLetter]:
        content = os.pread(file, os.fstat(file).st_size, 0)
        found = []
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                found.append(DeadLetter.model_validate_json(line))
            except ValidationError as error:
                raise SinkError(
                    f"{self._path}:{number}: is no dead letter ({error.error_count()} mistakes). Take that line out."
                ) from error
        return found


def _write(file: int, letters: Sequence[DeadLetter]) -> None:
    left = b"".join(letter.model_dump_json().encode() + b"\n" for letter in letters)
    while left:
        left = left[os.write(file, left) :]
    os.fsync(file)
