"""Erasure on demand: what is stored about a request or a tenant goes, that something was decided stays."""

from __future__ import annotations

from monitor.audit.record import Chain
from monitor.audit.store import Selector, Store
from monitor.events import Erased, Reference


def erase(store: Store, chain: Chain, by: Selector, value: str) -> list[Reference]:
    """Erase the contents of all records about a request or a tenant.

    That they were erased is written first, so that a content can never be missing without a word.

    Args:
        store: to change.
        chain: of the caller; gets an event if there is something to erase.
        by: what the value is.
        value: id of a request, the engine's or the client's, or name of a tenant.
    Returns: the records.
    Raises:
        monitor.audit.errors.AuditError: the store cannot be changed, or is damaged.
    """
    found = store.find(by, value)
    if found:
        store.append([chain.add(Erased(by=by.value, records=tuple(found)), None)])
        store.erase(found)
    return found
