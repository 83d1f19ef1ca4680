"""Records in SQLite or PostgreSQL, one table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    MetaData,
    Row,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    func,
    insert,
    inspect,
    or_,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from monitor.audit.errors import AuditStoreError, DamagedError
from monitor.audit.record import AuditRecord
from monitor.audit.store import Selector, Store, Stored
from monitor.events import Head, Reference

_PAGE = 1000
_BUSY_SECONDS = 5
_CONNECT_SECONDS = 5
_SQLITE = "sqlite"

_METADATA = MetaData()
_RECORDS = Table(
    "telltale_audit",
    _METADATA,
    Column("writer", String(32), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("prev", String(64), nullable=False),
    Column("key_id", String(16), nullable=False),
    Column("event", Text, nullable=False),
    Column("commitment", String(64), nullable=False),
    Column("mac", String(64), nullable=False),
    Column("salt", String(64)),
    Column("content", Text),
    # For queries; they repeat what the event and the content say, and go when the content goes.
    Column("time", Float, nullable=False),
    Column("request_id", Text),
    Column("client_request_id", Text),
    Column("tenant", Text),
    Index("telltale_audit_time", "time"),
    Index("telltale_audit_request", "request_id"),
    Index("telltale_audit_client_request", "client_request_id"),
    Index("telltale_audit_tenant", "tenant"),
)
_ABOUT = ("request_id", "client_request_id", "tenant")
_SIGNED = ("writer", "seq", "prev", "key_id", "event", "commitment", "mac", "salt", "content")


class SqlStore(Store):
    """Records in a database.

    SQLite runs in WAL mode; ``durable`` is ``synchronous=FULL``, which syncs the log at every commit, else NORMAL,
    which syncs it when the log is moved into the database. PostgreSQL: ``synchronous_commit`` on or off.
    """

    def __init__(self, engine: Engine, where: str) -> None:
        self._engine = engine
        self._where = where

    @classmethod
    def open(cls, url: str, *, durable: bool, make: bool) -> Self:
        """Open a database, and make the table if it is missing and may be made.

        Raises:
            AuditStoreError: it cannot be opened, or has no audit trail.
        """
        parsed = make_url(url)
        where = f"audit store {parsed.render_as_string(hide_password=True)}"
        arguments: dict[str, Any] = {}
        if parsed.drivername == _SQLITE:
            _require_file(Path(parsed.database or ""), where, make=make)
            arguments = {"timeout": _BUSY_SECONDS, "check_same_thread": False}
        else:
            parsed = parsed.set(drivername="postgresql+psycopg")
            option = f"-c synchronous_commit={'on' if durable else 'off'}"
            arguments = {"connect_timeout": _CONNECT_SECONDS, "options": option}
        try:
            engine = create_engine(parsed, connect_args=arguments, pool_pre_ping=True)
        except ModuleNotFoundError as error:
            raise AuditStoreError(f"{where}: needs {error.name}. Run: pip install telltale[postgresql]") from error
        if parsed.drivername == _SQLITE:
            event.listen(engine, "connect", _set_pragmas(durable=durable))
        store = cls(engine, where)
        with store._transaction() as connection:
            if not inspect(connection).has_table(_RECORDS.name):
                if not make:
                    raise AuditStoreError(f"{where}: holds no audit trail. Give the 'audit.url' of the policy file.")
                _METADATA.create_all(connection)
        return store

    def append(self, records: Sequence[AuditRecord]) -> None:
        """See ``Store``."""
        rows = [_row(record) for record in records]
        try:
            with self._transaction() as connection:
                connection.execute(insert(_RECORDS), rows)
        except AuditStoreError as error:
            # The answer to an earlier commit may have been lost on its way.
            if not isinstance(error.__cause__, IntegrityError) or not self._holds(records):
                raise

    def writers(self) -> list[str]:
        """See ``Store``."""
        began = func.min(_RECORDS.c.time)
        with self._transaction() as connection:
            query = select(_RECORDS.c.writer).group_by(_RECORDS.c.writer).order_by(began, _RECORDS.c.writer)
            return list(connection.execute(query).scalars())

    def newest(self, writer: str) -> Head | None:
        """See ``Store``."""
        query = select(_RECORDS.c.seq, _RECORDS.c.mac).where(_RECORDS.c.writer == writer)
        with self._transaction() as connection:
            row = connection.execute(query.order_by(_RECORDS.c.seq.desc()).limit(1)).first()
        return Head(writer=writer, seq=row.seq, mac=row.mac) if row is not None else None

    def read(self, writer: str, *, after: int = -1) -> Iterator[Stored]:
        """See ``Store``."""
        while True:
            query = select(_RECORDS).where(_RECORDS.c.writer == writer, _RECORDS.c.seq > after)
            with self._transaction() as connection:
                rows = connection.execute(query.order_by(_RECORDS.c.seq).limit(_PAGE)).all()
            for row in rows:
                yield _stored(row)
            if len(rows) < _PAGE:
                return
            after = rows[-1].seq

    def find(self, by: Selector, value: str) -> list[Reference]:
        """See ``Store``."""
        plain, columns = _lookup(value), _RECORDS.c
        wanted = columns.tenant == plain
        if by is Selector.REQUEST:
            wanted = or_(columns.request_id == plain, columns.client_request_id == plain)
        query = select(columns.writer, columns.seq).where(wanted).order_by(columns.writer, columns.seq)
        with self._transaction() as connection:
            rows = connection.execute(query).all()
        return [Reference(writer=row.writer, seq=row.seq) for row in rows]

    def erase(self, records: Sequence[Reference]) -> None:
        """See ``Store``."""
        nothing = dict.fromkeys(("salt", "content", *_ABOUT))
        with self._transaction() as connection:
            for record in records:
                place = (_RECORDS.c.writer == record.writer, _RECORDS.c.seq == record.seq)
                connection.execute(update(_RECORDS).where(*place).values(nothing))

    def prune(self, writer: str, below: int) -> None:
        """See ``Store``."""
        with self._transaction() as connection:
            connection.execute(delete(_RECORDS).where(_RECORDS.c.writer == writer, _RECORDS.c.seq < below))

    def close(self) -> None:
        """See ``Store``."""
        self._engine.dispose()

    def _holds(self, records: Sequence[AuditRecord]) -> bool:
        first, last = records[0], records[-1]
        place = (_RECORDS.c.writer == first.writer, _RECORDS.c.seq.between(first.seq, last.seq))
        with self._transaction() as connection:
            macs = connection.execute(select(_RECORDS.c.mac).where(*place).order_by(_RECORDS.c.seq)).scalars()
            return list(macs) == [record.mac for record in records]

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise AuditStoreError(
                f"{self._where}: {reason}. See that it can be reached, is writable and has room."
            ) from error


def _require_file(path: Path, where: str, *, make: bool) -> None:
    try:
        if make:
            # Texts may stand in it. SQLite gives its log files the mode of the database.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        elif not path.is_file():
            raise AuditStoreError(f"{where}: there is no such file. Give the 'audit.url' of the policy file.")
    except OSError as error:
        if isinstance(error, AuditStoreError):
            raise
        raise AuditStoreError(f"{where}: cannot be made ({error.strerror}). Choose a writable folder.") from error


def _set_pragmas(*, durable: bool) -> Any:
    def on_connect(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        # What is erased is overwritten, and not only forgotten.
        for pragma in ("journal_mode=WAL", f"synchronous={'FULL' if durable else 'NORMAL'}", "secure_delete=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return on_connect


def _row(record: AuditRecord) -> dict[str, Any]:
    return {**{name: getattr(record, name) for name in _SIGNED}, **_about(record)}


def _about(record: AuditRecord) -> dict[str, Any]:
    stored = Stored(record)
    content = stored.content
    said = {name: getattr(content, name) if content is not None else None for name in _ABOUT}
    return {
        "time": stored.event.time.timestamp(),
        **{name: _lookup(value) if value is not None else None for name, value in said.items()},
    }


def _stored(row: Row[Any]) -> Stored:
    values = row._mapping
    record = AuditRecord(**{name: values[name] for name in _SIGNED})
    try:
        wrong = [name for name, value in _about(record).items() if values[name] != value]
    except DamagedError as error:
        return Stored(record, str(error))
    return Stored(record, f"its column {wrong[0]!r} says something else" if wrong else "")


def _lookup(value: str) -> str:
    """An id as it stands in a column: clients choose some of them, and not every character can be stored."""
    return value.encode("ascii", "backslashreplace").decode().replace("\0", "\\x00")
