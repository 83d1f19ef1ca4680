"""What a server was told to run, in order: who said so, what came of it, and the text to go back to. Bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from monitor.types import ReloadOutcome, ReloadSource
from probes.errors import TelltaleError

MAX_ENTRIES = 64
"""The oldest go first; the policy that runs and the one before never do."""


class HistoryError(TelltaleError, LookupError):
    """There is nothing to go back to."""


@dataclass(frozen=True, slots=True)
class Reload:
    """One time that a server was given a policy.

    Attributes:
        number: counted from 0, the start of the server.
        time: UTC.
        source: what made the server read it.
        outcome: what came of it.
        digest: of the plan; None if it never became one.
        before: digest of the plan that ran until then.
        text: of the policy file.
        message: why it was not applied; empty if it was.
        setting: what is fixed at the start, where a restart is needed.
        seconds: that it took.
    """

    number: int
    time: datetime
    source: ReloadSource
    outcome: ReloadOutcome
    digest: str | None
    before: str
    text: str
    message: str = ""
    setting: str | None = None
    seconds: float = 0.0

    @property
    def ran(self) -> bool:
        """Whether it was in force at some time."""
        return self.outcome is ReloadOutcome.APPLIED


class History:
    """The newest entries.

    Args:
        started: what the server was started with.
        limit: how many entries are kept.
    """

    def __init__(self, started: Reload, *, limit: int = MAX_ENTRIES) -> None:
        self._entries: deque[Reload] = deque([started])
        self._running = started
        self._previous: Reload | None = None
        self._limit = limit
        self._next = started.number + 1

    def __iter__(self) -> Iterator[Reload]:
        """Oldest first."""
        return iter(self._entries)

    @property
    def running(self) -> Reload:
        """What is in force."""
        return self._running

    @property
    def next_number(self) -> int:
        """Of the next entry."""
        return self._next

    def add(self, entry: Reload) -> None:
        """One more."""
        self._next = entry.number + 1
        if entry.ran:
            self._previous, self._running = self._running, entry
        self._entries.append(entry)
        kept = (self._running, self._previous)
        while len(self._entries) > self._limit:
            oldest = next(number for number, item in enumerate(self._entries) if item not in kept)
            del self._entries[oldest]

    def target(self, number: int | None) -> Reload:
        """The entry to go back to.

        Args:
            number: its own; None for what ran before what runs now.
        Raises:
            HistoryError: it is not there, or was never in force.
        """
        ran = [entry for entry in self._entries if entry.ran]
        if number is None:
            if self._previous is None:
                raise HistoryError("nothing ran before: the server runs what it was started with.")
            return self._previous
        found = next((entry for entry in ran if entry.number == number), None)
        if found is None:
            known = ", ".join(str(entry.number) for entry in ran)
            raise HistoryError(f"there is no entry {number} that was in force. To go back to: {known}.")
        return found
