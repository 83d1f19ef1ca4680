"""Sessions in PostgreSQL, for several processes and replicas."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    Index,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    delete,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from monitor.session import Session
from monitor.sessions.settings import SessionSettings
from monitor.sessions.store import Change, SessionKey, SessionStore, SessionStoreError

_CONNECT_SECONDS = 2
_STATEMENT_MILLISECONDS = 2000
CONNECTIONS = 8
"""So many threads may use a store at the same time."""
_ATTEMPTS = 4

_METADATA = MetaData()
_SESSIONS = Table(
    "telltale_sessions",
    _METADATA,
    Column("session", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("seen", Float(53), nullable=False),
    Column("held", Float(53), nullable=False),
    Column("ends", Float(53), nullable=False),
    Column("state", Text, nullable=False),
    Index("telltale_sessions_tenant", "tenant", "seen"),
    Index("telltale_sessions_ends", "ends"),
)


class PostgresqlStore(SessionStore):
    """Sessions in one table. A change locks the session's row: two at a time happen one after the other.

    The whole table is bounded by ``per_tenant``, times the number of tenants, and by ``idle``; two new sessions at the
    same moment may exceed the bound by one. Times are those of the processes' clocks, which must agree.

    Args:
        engine: of the database.
        where: it is, without its password.
        settings: how many, and for how long.
        forgotten: is told how many sessions were forgotten for want of room.
    """

    def __init__(self, engine: Engine, where: str, settings: SessionSettings, forgotten: Callable[[int], None]) -> None:
        self._engine = engine
        self._where = where
        self._idle = settings.idle_seconds
        self._per_tenant = settings.per_tenant
        self._forgotten = forgotten
        self._swept = 0.0
        self._sweeping = threading.Lock()

    @classmethod
    def open(cls, settings: SessionSettings, forgotten: Callable[[int], None] = lambda count: None) -> Self:
        """Open a database, and make the table if it is missing.

        Args:
            settings: with a ``url``.
            forgotten: is told how many sessions were forgotten for want of room.
        Raises:
            SessionStoreError: it cannot be opened.
        """
        parsed = make_url(settings.url or "").set(drivername="postgresql+psycopg")
        where = f"session store {parsed.render_as_string(hide_password=True)}"
        arguments: dict[str, Any] = {
            "connect_timeout": _CONNECT_SECONDS,
            "options": f"-c statement_timeout={_STATEMENT_MILLISECONDS}",
        }
        try:
            engine = create_engine(
                parsed,
                connect_args=arguments,
                pool_pre_ping=True,
                pool_size=CONNECTIONS,
                pool_timeout=_CONNECT_SECONDS,
            )
        except ModuleNotFoundError as error:
            raise SessionStoreError(f"{where}: needs {error.name}. Run: pip install telltale[postgresql]") from error
        store = cls(engine, where, settings, forgotten)
        with store._transaction() as connection:
            _METADATA.create_all(connection)
        return store

    @property
    def is_remote(self) -> bool:
        """See ``SessionStore``."""
        return True

    def read(self, key: SessionKey, now: float) -> Session | None:
        """See ``SessionStore``."""
        names = (key.session, key.overflow.session)
        query = select(_SESSIONS.c.session, _SESSIONS.c.state)
        with self._transaction() as connection:
            rows = connection.execute(query.where(_SESSIONS.c.session.in_(names), _SESSIONS.c.ends > now)).all()
        found = {row.session: row.state for row in rows}
        state = found.get(names[0]) or found.get(names[1])
        return self._session(state) if state is not None else None

    def update(self, key: SessionKey, change: Change, now: float) -> Session:
        """See ``SessionStore``."""
        self._sweep(now)
        with self._transaction() as connection:
            name, before = self._locked(connection, key, now)
            after = change(before)
            values = {"seen": after.seen, "held": after.held, "ends": after.ends(self._idle), "state": after.to_json()}
            connection.execute(update(_SESSIONS).where(_SESSIONS.c.session == name).values(values))
        return after

    def close(self) -> None:
        """See ``SessionStore``."""
        self._engine.dispose()

    def _locked(self, connection: Connection, key: SessionKey, now: float) -> tuple[str, Session | None]:
        """The name of the row that a session has or gets, locked, and what is remembered in it."""
        columns = _SESSIONS.c
        name, overflow = key.session, key.overflow.session
        for _ in range(_ATTEMPTS):
            query = select(columns.state, columns.ends).where(columns.session == name).with_for_update()
            row = connection.execute(query).first()
            if row is not None:
                if row.ends > now:
                    return name, self._session(row.state)
                break
            if name != overflow and not self._has_room(connection, key, now):
                name = overflow
                continue
            # Whoever makes the same row at this moment is waited for here; its row is then read above.
            fresh = {"session": name, "tenant": key.tenant, "seen": now, "held": -math.inf, "ends": -math.inf}
            connection.execute(insert(_SESSIONS).values(**fresh, state="").on_conflict_do_nothing())
        else:
            raise SessionStoreError(
                f"{self._where}: a session is made and removed again and again. Is 'idle' too short?"
            )
        # What it was part of while there was no room for it goes on with it.
        shared = select(columns.state).where(columns.session == overflow, columns.ends > now)
        state = connection.execute(shared).scalar() if name != overflow else None
        return name, self._session(state) if state is not None else None

    def _has_room(self, connection: Connection, key: SessionKey, now: float) -> bool:
        """Make room for one more session of a tenant; whether there is some."""
        columns = _SESSIONS.c
        live = (columns.tenant == key.tenant, columns.ends > now, columns.session != key.overflow.session)
        if connection.execute(select(func.count()).where(*live)).scalar_one() < self._per_tenant:
            return True
        oldest = (
            select(columns.session).where(*live, columns.held <= now).order_by(columns.seen).limit(1)
        ).with_for_update(skip_locked=True)
        if not connection.execute(delete(_SESSIONS).where(columns.session.in_(oldest))).rowcount:
            return False
        self._forgotten(1)
        return True

    def _sweep(self, now: float) -> None:
        """From time to time: remove what has ended."""
        with self._sweeping:
            if now - self._swept < self._idle / 4:
                return
            self._swept = now
        ended = select(_SESSIONS.c.session).where(_SESSIONS.c.ends <= now).with_for_update(skip_locked=True)
        with self._transaction() as connection:
            connection.execute(delete(_SESSIONS).where(_SESSIONS.c.session.in_(ended)))

    def _session(self, state: str) -> Session:
        try:
            return Session.from_json(state)
        except ValueError as error:
            raise SessionStoreError(f"{self._where}: {error}. Remove the row, or the table.") from error

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise SessionStoreError(f"{self._where}: {reason}. See that it can be reached and is writable.") from error
