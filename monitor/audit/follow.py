"""Follows a store: what has come since one looked last, over all chains."""

from __future__ import annotations

from monitor.audit.store import Store, Stored


class Follower:
    """Reads on where it stopped.

    Args:
        store: to follow.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[str, int] = {}

    def last(self, count: int) -> list[Stored]:
        """The newest records of the store, by their time; what ``new`` gives begins behind them.

        Raises:
            monitor.audit.errors.AuditError: the store cannot be read, or is damaged.
        """
        for writer in self._store.writers():
            newest = self._store.newest(writer)
            if newest is not None:
                self._seen[writer] = newest.seq - count
        found = self.new()
        return found[len(found) - count :] if count else []

    def new(self) -> list[Stored]:
        """What has come since, by its time.

        Raises:
            monitor.audit.errors.AuditError: the store cannot be read, or is damaged.
        """
        found = []
        for writer in self._store.writers():
            for stored in self._store.read(writer, after=self._seen.get(writer, -1)):
                self._seen[writer] = stored.record.seq
                found.append(stored)
        return sorted(found, key=lambda stored: stored.event.time)
