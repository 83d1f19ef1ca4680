"""Which records are past their time. Removes nothing: what is to be removed is first said in a record of its own."""

from __future__ import annotations

from datetime import datetime

from monitor.audit.store import Store
from monitor.events import Pruned, PrunedChain


def expired(store: Store, before: datetime) -> Pruned | None:
    """What is to be removed so that nothing older than a moment is left.

    Of each chain, all records before the first one that is not older. The event names every chain that will not begin
    with its first record, those of earlier prunings too: the events that said so may be old themselves.

    Args:
        store: to look into.
        before: with a time zone.
    Returns: the event to write before anything is removed; None if nothing is to be removed.
    Raises:
        monitor.audit.errors.AuditError: the store cannot be read, or is damaged.
    """
    chains, found = [], False
    for writer in store.writers():
        begins = _begin(store, writer, before)
        if begins is not None:
            chains.append(begins)
            found |= next(store.read(writer)).record.seq < begins.below
    return Pruned(before=before, chains=tuple(chains)) if found else None


def _begin(store: Store, writer: str, before: datetime) -> PrunedChain | None:
    """Where a chain will begin; None if with its very first record."""
    may_go = store.can_prune(writer)
    below, mac = 0, ""
    for stored in store.read(writer):
        if not may_go or stored.event.time >= before:
            below, mac = stored.record.seq, stored.record.prev
            break
        below, mac = stored.record.seq + 1, stored.record.mac
    return PrunedChain(writer=writer, below=below, mac=mac) if below else None
