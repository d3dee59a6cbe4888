"""One SQLAlchemy session style for API and worker, on SQLite and on PostgreSQL.

    with database.read() as session: ...     only reads
    with database.write() as session: ...    commits at the end, rolls back on an error

Times are unix seconds (float) by the database's clock, so that hosts whose clocks differ agree on leases.
"""

import json
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import psycopg
from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    ColumnElement,
    Connection,
    Dialect,
    Double,
    Engine,
    Index,
    Integer,
    cast,
    create_engine,
    event,
    func,
    select,
    text,
)
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Session
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import Text, TypeDecorator

from app.fair_lock import FairLock
from app.spec.json_types import JsonObject

IDLE_SECONDS = 10
"""How long a transaction may stand idle before PostgreSQL ends it and frees its locks. Shorter than a lease."""
WRITES = "writes"
"""The execution option of a connection whose transactions write."""
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


class Table(DeclarativeBase):
    """The tables of every feature register here."""

    type_annotation_map = {
        float: Double,
        JsonObject: JSON,
        list[str]: JSON,
        list[JsonObject]: JSON,
        list[list[int]]: JSON(none_as_null=True),
    }


class database_now(FunctionElement[float]):  # noqa: N801 - reads as the SQL function it is
    """The database's clock at this statement: unix seconds with a sub-second part."""

    type = Double()
    inherit_cache = True


@compiles(database_now, "sqlite")
def _now_sqlite(_element: database_now, _compiler: SQLCompiler, **_: object) -> str:
    # `unixepoch('subsec')` is NULL before SQLite 3.42. A Julian day keeps the milliseconds of SQLite's clock.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(database_now, "postgresql")
def _now_postgresql(_element: database_now, _compiler: SQLCompiler, **_: object) -> str:
    # now() stands still inside a transaction; clock_timestamp() does not. As a subquery it is read once in a statement:
    # no index can be searched for a value that may differ from row to row.
    return "(SELECT CAST(extract(epoch FROM clock_timestamp()) AS double precision))"


def now(session: Session) -> float:
    """The database's clock, in unix seconds."""
    return session.scalars(select(database_now())).one()


def wait_for_others(session: Session, lock: int) -> None:
    """Take a transaction-scoped advisory lock (no-op on SQLite, which has one writer at a time)."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(lock)))


def mentions(column: InstrumentedAttribute[JsonObject], text: str) -> ColumnElement[bool]:
    """Whether a JSON column has the string `text` anywhere, as a key or a value.

    With it the database finds the few rows in question. To read the values of many rows takes seconds.
    """
    return cast(column, Text).contains(json.dumps(text), autoescape=True)


class PlainText(TypeDecorator[str]):
    """Text that users write. PostgreSQL cannot store U+0000, so every database stores U+FFFD instead."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value.replace("\x00", "\ufffd")


def index_where(name: str, *columns: str, where: str, sqlite: str | None = None) -> Index:
    """An index of only the rows that meet a condition. A query uses it if it asks for the same condition.

    `sqlite` is the condition as SQLite writes it, if that differs.
    """
    return Index(name, *columns, sqlite_where=text(sqlite or where), postgresql_where=text(where))


RowNumber = BigInteger().with_variant(Integer, "sqlite")
"""The type of a number that every new row increments. 32 bits last two years; SQLite's integers have 64."""


def new_id(prefix: str) -> str:
    """An id that cannot be guessed: `prefix-` and 24 letters and digits (142 bits)."""
    # 248 is 4 × 62, so each letter is equally likely. Fewer than 24 of the 64 bytes are below 248 at most once in 10^30
    # calls.
    letters = [ALPHABET[byte % 62] for byte in secrets.token_bytes(64) if byte < 248]
    return f"{prefix}-" + "".join(letters[:24])


class Database:
    """Opens sessions. It is safe to share between threads."""

    def __init__(self, url: str) -> None:
        self._turn: AbstractContextManager[None] = nullcontext()
        if url.startswith("sqlite:///"):
            # SQLite lets its writers wait with growing pauses, and whoever comes at the right moment is first. Some
            # would wait for seconds. Those of a process queue up instead.
            self._turn = FairLock()
            path = Path(url.removeprefix("sqlite:///"))
            path.parent.mkdir(parents=True, exist_ok=True)
            # As a URL's text, a path with a question mark would end there.
            self.engine = create_engine(
                URL.create("sqlite", database=str(path)), connect_args={"timeout": 10, "check_same_thread": False}
            )
            event.listen(self.engine, "connect", _sqlite_on_connect)
            event.listen(self.engine, "begin", _sqlite_on_begin)
        else:
            # A pooler between (PgBouncer) may give each transaction another session of the server. So nothing may stay
            # in a session: no prepared statement, no setting.
            arguments = {"connect_timeout": 5, "tcp_user_timeout": 10_000, "prepare_threshold": None}
            self.engine = create_engine(url, pool_pre_ping=True, connect_args=arguments)
            event.listen(self.engine, "begin", _postgresql_on_begin)
            event.listen(self.engine, "handle_error", _postgresql_on_error, retval=True)
        # SQLite fails at once, whatever its timeout, if a transaction reads first and writes later while another one
        # writes. A writer therefore takes the write lock when it begins.
        self._writer: Engine = self.engine.execution_options(**{WRITES: True})

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that only reads."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction. It is committed at the end of the block, and rolled back if the block raises."""
        with self._turn, Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def locked(self, lock: int) -> Iterator[Connection]:
        """A transaction that waits until no other process is in one with the same `lock`, however long it takes.

        It may change tables. On SQLite, foreign keys are not checked in it.
        """
        with self._writer.connect() as connection:
            if connection.dialect.name == "sqlite":  # one writer at a time: the wait is for the beginning
                driver = connection.connection.driver_connection
                assert driver is not None
                driver.execute("PRAGMA busy_timeout = 3600000")
                # A table is changed by making it anew: rows that refer to it must not notice that it is gone.
                driver.execute("PRAGMA foreign_keys = OFF")
            try:
                with connection.begin():
                    if connection.dialect.name == "postgresql":
                        connection.execute(select(func.pg_advisory_xact_lock(lock)))
                    yield connection
            finally:
                connection.invalidate()  # the settings end with the connection

    def close(self) -> None:
        self.engine.dispose()


def _postgresql_on_begin(connection: Connection) -> None:
    if WRITES in connection.get_execution_options():  # others hold no locks
        connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'")


OUTAGES = (
    psycopg.errors.IdleInTransactionSessionTimeout,
    psycopg.errors.ReadOnlySqlTransaction,  # the server has become a standby: a new connection finds the primary
    psycopg.errors.InvalidSqlStatementName,  # a pooler went on in another session
    psycopg.errors.DuplicatePreparedStatement,
)


def _postgresql_on_error(context: ExceptionContext) -> BaseException | None:
    """Report a session that was ended or exchanged, or that cannot write, like any other broken connection."""
    if not isinstance(context.original_exception, OUTAGES):
        return None
    context.is_disconnect = True  # the pool drops its connections: they may all be to the same standby
    return OperationalError(context.statement, None, context.original_exception, connection_invalidated=True)


def _sqlite_on_connect(connection: sqlite3.Connection, _record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # turns off the driver's own BEGIN; `_sqlite_on_begin` sends it
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _sqlite_on_begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if WRITES in connection.get_execution_options() else "BEGIN")
