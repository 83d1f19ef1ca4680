"""Writes events from one thread: a bounded queue in front, one commit for all that has gathered behind.

The caller is never held up. What may not go on before its event is stored waits for the event's ticket.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

import structlog

from monitor.audit.checkpoint import Checkpoints, CheckpointSink
from monitor.audit.errors import AuditError, AuditStoreError
from monitor.audit.key import AuditKey
from monitor.audit.record import AuditRecord, Chain
from monitor.audit.retention import expired
from monitor.audit.settings import AuditSettings, Durability, OnFull
from monitor.audit.store import Store
from monitor.events import Content, Dropped, Event, Head, Started, Stopped

log = structlog.get_logger(__name__)

MAX_BATCH = 512
MAX_HEADS = 64
PRUNE_SECONDS = 3600.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_IDLE_SECONDS = 1.0
_CLOSING_TRIES = 3

Ticket = Future[None]
"""Done when the event is stored."""


class Observer(Protocol):
    """Who is told what the writer does; may be called from its thread."""

    def stored(self, kind: str, seconds: float) -> None:
        """An event has been stored so many seconds after it was handed in."""

    def waiting(self, count: int) -> None:
        """So many events wait."""

    def dropped(self, count: int) -> None:
        """So many were not written."""

    def failed(self) -> None:
        """An attempt to write has failed."""


@dataclass(frozen=True, slots=True)
class _Item:
    event: Event
    content: Callable[[], Content] | None
    ticket: Ticket
    since: float


class AuditWriter:
    """The chain of this process.

    Args:
        store: to write to; the writer closes it.
        key: to sign with.
        settings: the policy file's.
        observer: is told what happens.
        sink: for checkpoints; None: none are sent.
    """

    def __init__(
        self,
        store: Store,
        key: AuditKey,
        settings: AuditSettings,
        observer: Observer,
        sink: CheckpointSink | None = None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._observer = observer
        self._chain = Chain(key)
        self._checkpoints = Checkpoints(self._chain, sink) if sink is not None else None
        self._changed = threading.Condition()
        self._queue: deque[_Item] = deque()
        self._dropped = 0
        self._closing = False
        self._failing = False
        self._pruned_at = float("-inf")
        self._thread = threading.Thread(target=self._run, name="telltale-audit", daemon=True)

    def start(self, started: Started) -> None:
        """Begin the chain; when this returns, its first record is stored.

        Args:
            started: what the first record says; the ends of other chains are added.
        Raises:
            AuditStoreError: the store cannot be written.
        """
        heads = newest_heads(self._store)
        self._store.append([self._chain.add(started.model_copy(update={"heads": heads}), None)])
        self._observer.stored(started.kind, 0.0)
        self._thread.start()

    @property
    def writer(self) -> str:
        """Name of the chain."""
        return self._chain.writer

    @property
    def is_failing(self) -> bool:
        """Whether what is handed in now would not be stored: the last attempt failed, or the thread has died."""
        return self._failing or not self._thread.is_alive()

    @property
    def is_full(self) -> bool:
        """Whether as many events wait as may."""
        return len(self._queue) >= self._settings.queue

    def submit(self, event: Event, content: Callable[[], Content] | None = None) -> Ticket | None:
        """Hand in an event.

        Args:
            event: to be written.
            content: makes what is stored beside it; called in the writer's thread, and may not raise.
        Returns: its ticket if something has to wait for it, else None.
        """
        drops = self._settings.on_full is OnFull.DROP
        with self._changed:
            if self.is_full and (drops or (self.is_failing and not self._settings.blocks_on_error)):
                self._dropped += 1
                self._observer.dropped(1)
                return None
            ticket: Ticket = Future()
            self._queue.append(_Item(event, content, ticket, time.monotonic()))
            self._observer.waiting(len(self._queue))
            self._changed.notify()
        return ticket if self._settings.durability is Durability.BEFORE_RELEASE else None

    def close(self, timeout: float = 10.0) -> bool:
        """Write what waits, end the chain, and close the store.

        Args:
            timeout: seconds to wait for that.
        Returns: whether all was written.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive() and not self._failing

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._dropped or self._closing, timeout=_IDLE_SECONDS)
                batch = [self._queue.popleft() for _ in range(min(len(self._queue), MAX_BATCH))]
                dropped, self._dropped = self._dropped, 0
                ends = self._closing and not self._queue
                self._observer.waiting(len(self._queue))
            self._write(batch, dropped, ends=ends)
            if ends:
                self._finish()
                return
            self._keep_house()

    def _write(self, batch: Sequence[_Item], dropped: int, *, ends: bool) -> None:
        records = [self._chain.add(Dropped(count=dropped), None)] if dropped else []
        records += [self._chain.add(item.event, item.content() if item.content else None) for item in batch]
        if ends:
            records.append(self._chain.add(Stopped(), None))
        if not records or not self._append(records):
            return
        now = time.monotonic()
        for item in batch:
            item.ticket.set_result(None)
            self._observer.stored(item.event.kind, now - item.since)

    def _append(self, records: Sequence[AuditRecord]) -> bool:
        """Try until it works: records are not given up as long as this process lives."""
        pause, tries = _FIRST_PAUSE, 0
        while True:
            try:
                self._store.append(records)
            except AuditStoreError as error:
                if not self._failing:
                    log.error("the audit trail cannot be written", reason=str(error))  # noqa: TRY400 - it says it all
                self._failing = True
                self._observer.failed()
                tries += 1
                with self._changed:
                    self._observer.waiting(len(self._queue))
                    self._changed.wait_for(lambda: self._closing, timeout=pause)
                    if self._closing and tries >= _CLOSING_TRIES:
                        return False
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if self._failing:
                    log.info("the audit trail is written again")
                self._failing = False
                return True

    def _keep_house(self) -> None:
        days, now = self._settings.retention_days, time.monotonic()
        try:
            if self._checkpoints is not None:
                self._checkpoints.send_if_due()
            if days is not None and now - self._pruned_at >= PRUNE_SECONDS:
                self._pruned_at = now
                pruned = expired(self._store, datetime.now(UTC) - timedelta(days=days))
                if pruned is not None and self._append([self._chain.add(pruned, None)]):
                    for chain in pruned.chains:
                        self._store.prune(chain.writer, chain.below)
        except AuditError as error:
            # Neither holds up a response: the records are stored.
            log.error("the audit trail: no checkpoint, or not pruned", reason=str(error))  # noqa: TRY400 - it says it all
            self._observer.failed()

    def _finish(self) -> None:
        try:
            if self._checkpoints is not None and not self._failing:
                self._checkpoints.send()
            self._store.close()
        except (AuditStoreError, OSError) as error:
            log.error("the audit trail was not closed well", reason=str(error))  # noqa: TRY400 - it says it all


def newest_heads(store: Store) -> tuple[Head, ...]:
    """The ends of the chains that began last.

    Raises:
        AuditStoreError: the store cannot be read.
    """
    found = (store.newest(writer) for writer in store.writers()[-MAX_HEADS:])
    return tuple(head for head in found if head is not None)
