"""Where events go: one way in, however many there are behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from monitor.events import Content, Event


class Outlet(Protocol):
    """Takes events, and never holds up whoever hands them in."""

    def submit(self, event: Event, content: Callable[[], Content] | None = None) -> Future[None] | None:
        """Hand in an event.

        Args:
            event: what has happened.
            content: makes what belongs to it; may be called more than once, in any thread, and does not raise.
        Returns: what a response has to wait for, if it has to.
        """


class Outlets:
    """Hands an event to several outlets.

    Args:
        outlets: of which one at most gives something to wait for.
    """

    def __init__(self, outlets: Sequence[Outlet]) -> None:
        self._outlets = tuple(outlets)

    def submit(self, event: Event, content: Callable[[], Content] | None = None) -> Future[None] | None:
        """See ``Outlet``."""
        tickets = [outlet.submit(event, content) for outlet in self._outlets]
        return next((ticket for ticket in tickets if ticket is not None), None)
