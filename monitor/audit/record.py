"""One record of an audit trail, and the chain that it is a link of. Knows no store."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, replace
from typing import Self

from monitor.audit.key import AuditKey
from monitor.events import Content, Event, canonical

ORIGIN = "0" * 64
"""What the first record of a chain follows."""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """An event in its chain.

    The MAC covers all but ``salt`` and ``content``, which the commitment stands for: both can be taken away, and nobody
    who has only the commitment can tell whether a guessed content is right.

    Attributes:
        writer: of the chain: 32 hexadecimal digits, new with every process that writes.
        seq: place in the chain, from 0.
        prev: MAC of the record before.
        key_id: of the key that it is signed with.
        event: canonical JSON.
        commitment: SHA-256 over salt and content, hexadecimal; empty if it never had a content.
        mac: 64 hexadecimal digits.
        salt: 64 hexadecimal digits; None where the content was erased.
        content: canonical JSON; None likewise.
    """

    writer: str
    seq: int
    prev: str
    key_id: str
    event: str
    commitment: str
    mac: str
    salt: str | None
    content: str | None

    def is_signed(self, key: AuditKey) -> bool:
        """Whether the MAC is right."""
        return hmac.compare_digest(self.mac.encode(), _mac(key, self).encode())

    def holds_its_content(self) -> bool:
        """Whether the content is the one that the writer committed to."""
        if self.salt is None or self.content is None:
            return False
        return hmac.compare_digest(self.commitment.encode(), _commit(self.salt, self.content).encode())

    def erased(self) -> Self:
        """The record without its content; it is still signed."""
        return replace(self, salt=None, content=None)


class Chain:
    """The chain of one writer: makes records, and keeps the MAC that the next one follows.

    Args:
        key: to sign with.
        writer: of the chain; made if left out.
    """

    def __init__(self, key: AuditKey, writer: str | None = None) -> None:
        self._key = key
        self.writer = writer or secrets.token_hex(16)
        self._next = 0
        self._newest = ORIGIN

    @property
    def key(self) -> AuditKey:
        """What it signs with."""
        return self._key

    @property
    def length(self) -> int:
        """Records so far."""
        return self._next

    @property
    def newest(self) -> str:
        """MAC of the newest record."""
        return self._newest

    def add(self, event: Event, content: Content | None) -> AuditRecord:
        """The next record."""
        said = canonical(content) if content is not None else None
        salt = secrets.token_hex(32) if said is not None else None
        commitment = _commit(salt, said) if salt is not None and said is not None else ""
        unsigned = AuditRecord(
            self.writer, self._next, self._newest, self._key.key_id, event.spelled, commitment, "", salt, said
        )
        record = replace(unsigned, mac=_mac(self._key, unsigned))
        self._next += 1
        self._newest = record.mac
        return record


def _mac(key: AuditKey, record: AuditRecord) -> str:
    return key.mac("record", record.writer, record.seq, record.prev, record.key_id, record.commitment, record.event)


def _commit(salt: str, content: str) -> str:
    return hashlib.sha256(f"{salt}\n{content}".encode()).hexdigest()
