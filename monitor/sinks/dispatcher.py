"""Sends messages to one sink from a thread of its own: a bounded queue in front, retries and dead letters behind."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from monitor.sinks.backoff import Backoff
from monitor.sinks.dead_letters import DeadLetter, DeadLetters
from monitor.sinks.delivery import Delivery, Failure, Outcome
from monitor.sinks.message import Message

log = structlog.get_logger(__name__)


class Observer(Protocol):
    """Who is told what becomes of messages; may be called from any thread."""

    def delivered(self, sink: str, seconds: float) -> None:
        """A message has arrived so many seconds after it was handed in."""

    def failed(self, sink: str, failure: Failure) -> None:
        """An attempt has failed."""

    def dropped(self, sink: str) -> None:
        """A message was not taken in: the queue is full."""

    def dead(self, sink: str) -> None:
        """A message was given up, and stands in the file of dead letters or, if that cannot be written, nowhere."""

    def waiting(self, sink: str, count: int) -> None:
        """So many messages wait, with the one that is being sent."""


@dataclass(frozen=True, slots=True)
class _Item:
    make: Callable[[], Message]
    since: float


class Dispatcher:
    """The way to one sink.

    Args:
        sink: its name.
        delivery: makes one attempt; closed with the dispatcher.
        dead_letters: where messages go that were given up.
        observer: is told what happens.
        queue: messages that may wait.
        tries: attempts for one message.
        backoff: the pauses between them.
    """

    def __init__(
        self,
        sink: str,
        delivery: Delivery,
        dead_letters: DeadLetters,
        observer: Observer,
        *,
        queue: int,
        tries: int,
        backoff: Backoff | None = None,
    ) -> None:
        self._sink = sink
        self._delivery = delivery
        self._dead_letters = dead_letters
        self._observer = observer
        self._limit = queue
        self._tries = tries
        self._backoff = backoff or Backoff()
        self._changed = threading.Condition()
        self._queue: deque[_Item] = deque()
        self._sending = 0
        self._closes_at: float | None = None
        self._told_drops = False
        self._thread = threading.Thread(target=self._run, name=f"telltale-sink-{sink}", daemon=True)
        self._thread.start()

    def offer(self, make: Callable[[], Message]) -> None:
        """Hand in a message; returns at once, and drops it if too many wait.

        Args:
            make: makes it, in the thread of the dispatcher; may not raise.
        """
        with self._changed:
            full = len(self._queue) >= self._limit or self._closes_at is not None
            if not full:
                self._queue.append(_Item(make, time.monotonic()))
                self._tell_waiting()
                self._changed.notify()
        if full:
            self._observer.dropped(self._sink)
            if not self._told_drops:
                self._told_drops = True
                log.error("a sink is too slow: messages are dropped and counted", sink=self._sink)

    def end(self, timeout: float) -> None:
        """Begin to end: send what waits, once each, as long as there is time; the rest becomes dead letters.

        Args:
            timeout: seconds for that; the attempt that is being made then is still finished.
        """
        with self._changed:
            self._closes_at = time.monotonic() + timeout
            self._changed.notify()

    def join(self, timeout: float) -> bool:
        """Wait until it has ended.

        Args:
            timeout: seconds.
        Returns: whether it has.
        """
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._sending = 0
                self._tell_waiting()
                self._changed.wait_for(lambda: self._queue or self._closes_at is not None)
                item = self._queue.popleft() if self._queue else None
                self._sending = 1
            if item is None:
                self._delivery.close()
                return
            self._send(item)

    def _send(self, item: _Item) -> None:
        message, tries = item.make(), 0
        outcome = Outcome(detail="the server ended before it could be sent")
        while tries < self._tries and not self._is_late():
            tries += 1
            outcome = self._delivery.attempt(message)
            if outcome.failure is None:
                self._observer.delivered(self._sink, time.monotonic() - item.since)
                self._told_drops = False
                return
            self._observer.failed(self._sink, outcome.failure)
            if not outcome.retry or tries == self._tries:
                break
            pause = self._backoff.pause(tries, outcome.after_seconds)
            with self._changed:
                if self._changed.wait_for(lambda: self._closes_at is not None, timeout=pause):
                    # Another attempt without a pause would be the last one anyway.
                    break
        self._bury(message, tries, outcome)

    def _bury(self, message: Message, tries: int, outcome: Outcome) -> None:
        log.error("a message was not delivered", sink=self._sink, id=message.id, reason=outcome.detail, tries=tries)
        letter = DeadLetter(
            sink=self._sink, id=message.id, body=message.body.decode(), reason=outcome.detail, tries=tries
        )
        try:
            self._dead_letters.add([letter])
        except OSError as error:
            log.error("a dead letter cannot be kept: the message is lost", sink=self._sink, reason=error.strerror)  # noqa: TRY400 - it says it all
        self._observer.dead(self._sink)

    def _is_late(self) -> bool:
        return self._closes_at is not None and time.monotonic() > self._closes_at

    def _tell_waiting(self) -> None:
        self._observer.waiting(self._sink, len(self._queue) + self._sending)
