"""Where sessions are kept: what every store can do."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from monitor.session import Session
from probes.errors import TelltaleError

Change = Callable[[Session | None], Session]
"""Makes of a session what it is after a request; of None if there was none. It may be called more than once."""


class SessionStoreError(TelltaleError, RuntimeError):
    """A store of sessions cannot be used."""


@dataclass(frozen=True, slots=True)
class SessionKey:
    """Whose requests belong together, in digests: a store never learns what clients call themselves.

    Attributes:
        tenant: whose.
        session: of it; the tenant's own, for all of its requests, has a key like any other.
    """

    tenant: str
    session: str

    @classmethod
    def of(cls, tenant: str, session: str | None) -> Self:
        """The key of a session as its client names it; None for all requests of the tenant."""
        return cls(_digest([tenant]), _digest([tenant, session]))

    @property
    def overflow(self) -> SessionKey:
        """The one session that takes in all those for which there is no room."""
        return SessionKey(self.tenant, _digest([self.tenant, 0]))


class SessionStore(ABC):
    """Sessions by their keys, bounded.

    A tenant's sessions are its own and fill its own room. Where there is no room, the session whose last request is
    the longest ago is forgotten, but never one that is held (``Session.held``). If all are, what comes new shares one
    session of the tenant, so that nobody gets free by opening others, and nobody goes unwatched.
    """

    @property
    @abstractmethod
    def is_remote(self) -> bool:
        """Whether its methods wait for another machine, and are better called in a thread."""

    @abstractmethod
    def read(self, key: SessionKey, now: float) -> Session | None:
        """A session; None if nothing is remembered of it.

        Raises:
            SessionStoreError: the store cannot be reached.
        """

    @abstractmethod
    def update(self, key: SessionKey, change: Change, now: float) -> Session:
        """Change a session in one piece: of two changes at a time, each sees all or nothing of the other.

        Raises:
            SessionStoreError: the store cannot be reached; nothing has changed.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of what is open."""


def _digest(parts: list[str | int | None]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
