"""Sessions in the memory of one process."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

from monitor.session import Session
from monitor.sessions.settings import SessionSettings
from monitor.sessions.store import Change, SessionKey, SessionStore


class _Room:
    """The sessions of one tenant, those whose last request is the longest ago first; those that are held apart.

    ``shared`` is the one for which nobody had room; it is not counted. Before ``wakes`` nothing that is held is let go.
    """

    def __init__(self) -> None:
        self.shared: Session | None = None
        self.free: OrderedDict[str, Session] = OrderedDict()
        self.held: OrderedDict[str, Session] = OrderedDict()
        self.wakes = math.inf

    def __len__(self) -> int:
        return len(self.free) + len(self.held)

    def get(self, name: str) -> Session | None:
        return self.free.get(name) or self.held.get(name)

    def drop(self, name: str) -> None:
        self.free.pop(name, None)
        self.held.pop(name, None)

    def put(self, name: str, session: Session, now: float, idle: float) -> None:
        self.drop(name)
        if session.held > now:
            self.held[name] = session
            self.wakes = min(self.wakes, session.held, session.ends(idle))
        else:
            self.free[name] = session


class MemoryStore(SessionStore):
    """Sessions of one process, which forgets them when it ends. Not for threads: the caller's loop is the lock.

    Args:
        settings: how many, and for how long.
        forgotten: is told how many sessions were forgotten for want of room.
    """

    def __init__(self, settings: SessionSettings, forgotten: Callable[[int], None] = lambda count: None) -> None:
        self._idle = settings.idle_seconds
        self._per_tenant = settings.per_tenant
        self._total = settings.total
        self._forgotten = forgotten
        self._rooms: dict[str, _Room] = {}
        self._count = 0
        self._swept = -math.inf

    def __len__(self) -> int:
        return self._count

    @property
    def is_remote(self) -> bool:
        """See ``SessionStore``."""
        return False

    def read(self, key: SessionKey, now: float) -> Session | None:
        """See ``SessionStore``."""
        room = self._rooms.get(key.tenant)
        if room is None:
            return None
        return self._live(room.get(key.session), now) or self._live(room.shared, now)

    def update(self, key: SessionKey, change: Change, now: float) -> Session:
        """See ``SessionStore``."""
        if now - self._swept > self._idle / 4:
            self._sweep_all(now)
        room = self._rooms.setdefault(key.tenant, _Room())
        own, shared = self._live(room.get(key.session), now), self._live(room.shared, now)
        if own is None and not self._has_room(room, now):
            room.shared = change(shared)
            return room.shared
        # What it was part of while there was no room for it goes on with it.
        after = change(own or shared)
        self._count -= len(room)
        room.put(key.session, after, now, self._idle)
        self._count += len(room)
        return after

    def close(self) -> None:
        """See ``SessionStore``."""

    def _live(self, session: Session | None, now: float) -> Session | None:
        return session if session is not None and session.ends(self._idle) > now else None

    def _has_room(self, room: _Room, now: float) -> bool:
        """Make room for one more session of a tenant; whether there is some."""
        self._sweep(room, now)
        if len(room) >= self._per_tenant:
            return self._forget(room)
        if self._count < self._total:
            return True
        # Whoever has the most sessions makes room: a tenant cannot push out another's by opening many.
        largest = max(self._rooms.values(), key=lambda other: len(other.free))
        self._sweep(largest, now)
        return self._count < self._total or self._forget(largest)

    def _sweep(self, room: _Room, now: float) -> None:
        """Drop what has ended, and let go what is not held any more."""
        before = len(room)
        while room.free and next(iter(room.free.values())).ends(self._idle) <= now:
            room.free.popitem(last=False)
        if not room.free and now >= room.wakes:
            held, room.held, room.wakes = room.held, OrderedDict(), math.inf
            for name, session in held.items():
                if session.ends(self._idle) > now:
                    room.put(name, session, now, self._idle)
        self._count -= before - len(room)

    def _sweep_all(self, now: float) -> None:
        """Drop what has ended everywhere; tenants that nothing is left of too."""
        self._swept = now
        for tenant, room in list(self._rooms.items()):
            for sessions in (room.free, room.held):
                for name in [name for name, found in sessions.items() if found.ends(self._idle) <= now]:
                    del sessions[name]
                    self._count -= 1
            room.shared = self._live(room.shared, now)
            if not len(room) and room.shared is None:
                del self._rooms[tenant]

    def _forget(self, room: _Room) -> bool:
        if not room.free:
            return False
        room.free.popitem(last=False)
        self._count -= 1
        self._forgotten(1)
        return True
