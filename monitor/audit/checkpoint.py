"""Checkpoints: the ends of chains, signed and kept elsewhere, so that a chain cannot be shortened unseen."""

from __future__ import annotations

import hmac
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from monitor.audit.errors import AuditError, AuditStoreError
from monitor.audit.key import AuditKey
from monitor.audit.record import Chain

EVERY_SECONDS = 60.0
EVERY_RECORDS = 1000


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """That a chain had a record.

    Attributes:
        time: Unix seconds.
        writer: of the chain.
        seq: its newest record then.
        record: MAC of that record.
        key_id: of the key that signed this.
        mac: over all of it.
    """

    time: float
    writer: str
    seq: int
    record: str
    key_id: str
    mac: str

    def is_signed(self, key: AuditKey) -> bool:
        """Whether the MAC is right."""
        return hmac.compare_digest(self.mac.encode(), _mac(key, self.time, self.writer, self.seq, self.record).encode())


class CheckpointSink(Protocol):
    """Where checkpoints are sent."""

    def send(self, checkpoint: Checkpoint) -> None:
        """Keep one.

        Raises:
            AuditStoreError: it cannot be kept.
        """


class CheckpointFile:
    """A file, one checkpoint a line, only ever appended to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def send(self, checkpoint: Checkpoint) -> None:
        """See ``CheckpointSink``."""
        fields = {name: getattr(checkpoint, name) for name in Checkpoint.__slots__}
        line = json.dumps(fields, separators=(",", ":")).encode() + b"\n"
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise AuditStoreError(
                f"audit checkpoints {self._path}: cannot be written ({error.strerror}). Choose a writable file."
            ) from error


class Checkpoints:
    """Sends the end of a chain from time to time.

    Args:
        chain: whose ends.
        sink: where they go.
        clock: seconds since any one moment.
    """

    def __init__(self, chain: Chain, sink: CheckpointSink, clock: Callable[[], float] = time.monotonic) -> None:
        self._chain = chain
        self._sink = sink
        self._clock = clock
        self._sent = 0
        self._sent_at = clock()

    def send_if_due(self) -> None:
        """Send one if there are many new records, or some and the last one is a while ago.

        Raises:
            AuditStoreError: see ``CheckpointSink.send``.
        """
        new = self._chain.length - self._sent
        if new >= EVERY_RECORDS or (new and self._clock() - self._sent_at >= EVERY_SECONDS):
            self.send()

    def send(self) -> None:
        """Send one, unless the chain has nothing new.

        Raises:
            AuditStoreError: see ``CheckpointSink.send``.
        """
        if self._chain.length == self._sent:
            return
        key, now, last = self._chain.key, time.time(), self._chain.length - 1
        mac = _mac(key, now, self._chain.writer, last, self._chain.newest)
        self._sink.send(Checkpoint(now, self._chain.writer, last, self._chain.newest, key.key_id, mac))
        self._sent, self._sent_at = self._chain.length, self._clock()


def read_checkpoints(path: Path) -> list[Checkpoint]:
    """The checkpoints of a file. A last line without an end is left out: its writer died.

    Raises:
        AuditError: it cannot be read, or a line is no checkpoint.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise AuditError(f"audit checkpoints {path}: cannot be read ({error.strerror}).") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n") and number == len(lines):
            break
        try:
            found.append(Checkpoint(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise AuditError(f"audit checkpoints {path}:{number}: is no checkpoint. Was the file edited?") from error
    return found


def _mac(key: AuditKey, now: float, writer: str, seq: int, record: str) -> str:
    return key.mac("checkpoint", repr(now), writer, seq, record)
