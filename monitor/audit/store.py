"""Where records are kept: what every kind of store can do, and opening one by its URL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pydantic import ValidationError

from monitor.audit.errors import AuditError, DamagedError
from monitor.audit.record import AuditRecord
from monitor.events import Content, Event, Head, Reference, parse_content, parse_event


class Selector(StrEnum):
    """By what contents are found."""

    REQUEST = "request"
    """The engine's id or the client's own."""
    TENANT = "tenant"


@dataclass(frozen=True, slots=True)
class Stored:
    """A record as a store holds it.

    Attributes:
        record: the record.
        wrong: what the store keeps beside the record and does not agree with it; empty if all does.
    """

    record: AuditRecord
    wrong: str = ""

    @property
    def event(self) -> Event:
        """What is said.

        Raises:
            DamagedError: it is no event of this version.
        """
        try:
            return parse_event(self.record.event)
        except ValidationError as error:
            raise DamagedError(f"{self.place}: holds no event that this version of telltale knows") from error

    @property
    def content(self) -> Content | None:
        """Whom it is about; None if it has no content, or no longer.

        Raises:
            DamagedError: it is no content.
        """
        if self.record.content is None:
            return None
        try:
            return parse_content(self.record.content)
        except ValidationError as error:
            raise DamagedError(f"{self.place}: its content is damaged") from error

    @property
    def place(self) -> str:
        """For messages: which record."""
        return f"chain {self.record.writer[:8]} record {self.record.seq}"

    def matches(self, by: Selector, value: str) -> bool:
        """Whether its content is about this request or tenant.

        Raises:
            DamagedError: see ``content``.
        """
        content = self.content
        if content is None:
            return False
        if by is Selector.TENANT:
            return content.tenant == value
        return value in (content.request_id, content.client_request_id)


class Store(ABC):
    """Records of any number of chains. Not for use by several threads at once.

    Every method raises ``AuditStoreError`` where the store cannot be reached or written.
    """

    @abstractmethod
    def append(self, records: Sequence[AuditRecord]) -> None:
        """Add records, all or none; with ``before_release`` they are on stable storage when this returns.

        May be called again with the same records after it failed.

        Args:
            records: of one chain, in its order.
        """

    @abstractmethod
    def writers(self) -> list[str]:
        """All chains, those that began last at the end."""

    @abstractmethod
    def newest(self, writer: str) -> Head | None:
        """The end of a chain; None if there is no such chain."""

    @abstractmethod
    def read(self, writer: str, *, after: int = -1) -> Iterator[Stored]:
        """The records of a chain behind a sequence number, in their order.

        Raises:
            DamagedError: what stands there is no record.
        """

    def find(self, by: Selector, value: str) -> list[Reference]:
        """The records whose content is about a request or a tenant.

        Raises:
            DamagedError: a record is damaged.
        """
        return [
            Reference(writer=writer, seq=stored.record.seq)
            for writer in self.writers()
            for stored in self.read(writer)
            if stored.matches(by, value)
        ]

    @abstractmethod
    def erase(self, records: Sequence[Reference]) -> None:
        """Remove the contents of records, wherever the store keeps them; the records stay."""

    def can_prune(self, writer: str) -> bool:
        """Whether a chain's oldest records can be removed now; some stores have to wait until its writer has ended."""
        return True

    @abstractmethod
    def prune(self, writer: str, below: int) -> None:
        """Remove the records of a chain with smaller sequence numbers."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""


def open_store(url: str, *, durable: bool = True, make: bool = False) -> Store:
    """The store at a URL.

    Args:
        url: with absolute paths; see ``monitor.audit.settings``.
        durable: whether ``append`` waits for stable storage.
        make: make a store that is not there yet.
    Raises:
        AuditError: the URL is none of ours.
        AuditStoreError: it cannot be opened.
    """
    if url.startswith("jsonl:///"):
        from monitor.audit.jsonl import JsonlStore

        return JsonlStore.open(url, durable=durable, make=make)
    if url.startswith(("sqlite:///", "postgresql://", "postgresql+psycopg://")):
        from monitor.audit.sql import SqlStore

        return SqlStore.open(url, durable=durable, make=make)
    raise AuditError(
        f"audit store {url.partition(':')[0]!r}: not known. Use sqlite:///FILE, postgresql://USER@HOST/DATABASE or "
        "jsonl:///FOLDER."
    )
