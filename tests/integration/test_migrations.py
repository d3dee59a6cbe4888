"""Each migration keeps the rows of its tables, up and down, on both databases."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import JSON, Boolean, Column, Float, Integer, LargeBinary, MetaData, Table, func, insert, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from app.migrate import MigrationBlocked, alembic_config, is_current, migrate
from app.services import Services
from app.settings import Settings

REVISIONS = [script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()][::-1]
BEFORE_AN_ALTER_TABLE = "0015"
PACKED = b"x\x9c\x8b\x8e\x05\x00\x01\x15\x00\xb9"
"""No events, as a block stores them: `zlib.compress(b"[]")`."""


def value_of(column: Column[Any], revision: str) -> object:
    """A value for a column of a row that `add_rows` writes at `revision`."""
    for key in column.foreign_keys:
        column = key.column
    if isinstance(column.type, Boolean):
        return False
    if isinstance(column.type, (Integer, Float)):
        return int(revision)
    if isinstance(column.type, LargeBinary):
        return PACKED
    return {} if isinstance(column.type, JSON) else f"{column.table.name}-{revision}"


def tables(connection: Connection) -> Iterator[Table]:
    """All tables with data. A table comes after those that it refers to."""
    metadata = MetaData()
    metadata.reflect(connection)
    return (table for table in metadata.sorted_tables if table.name != "alembic_version")


def add_rows(connection: Connection, revision: str) -> None:
    """Write a row to each table, as the version of this revision might have done."""
    for table in tables(connection):
        required = [column for column in table.columns if not column.nullable and column.server_default is None]
        columns = {*required, *(column for column in table.columns if column.foreign_keys)}
        connection.execute(insert(table).values({column.name: value_of(column, revision) for column in columns}))


def counts(services: Services) -> dict[str, int]:
    with services.database.engine.connect() as connection:
        return {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in tables(connection)
        }


@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index")
def test_rows_of_every_version_survive_the_way_up_and_down(settings: Settings) -> None:
    services = Services.of(settings)
    written: dict[str, int] = {}
    for revision in REVISIONS:
        migrate(services.database, revision)
        kept = counts(services)
        assert {name: kept.get(name, 0) for name in written} == written, f"{revision} lost rows"
        with services.database.engine.begin() as connection:
            add_rows(connection, revision)
        written = counts(services)
    for revision in REVISIONS[-2::-1]:
        migrate(services.database, revision)
        kept = counts(services)
        assert kept == {name: written[name] for name in kept}, f"the way back to {revision} lost rows"
    services.database.close()


def read_all(session: Session) -> None:
    """Read every table, as a dump does."""
    for table in tables(session.connection()):
        session.execute(select(func.count()).select_from(table))


@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index")
def test_a_migration_that_has_to_wait_stops_nobody_else(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dump reads a table for long. Requests that come after the migration must not wait behind it."""
    monkeypatch.setattr("app.migrate.LOCK_SECONDS", 0.2)
    monkeypatch.setattr("app.migrate.LOCK_PAUSE_SECONDS", 0.2)
    services = Services.of(settings)
    migrate(services.database, BEFORE_AN_ALTER_TABLE)
    with ThreadPoolExecutor(1) as pool:
        with services.database.read() as dump:
            read_all(dump)
            if dump.get_bind().dialect.name == "postgresql":
                migration = pool.submit(migrate, services.database)
                for _ in range(20):
                    with services.database.read() as request:
                        request.execute(text("SET LOCAL statement_timeout = '5s'"))
                        read_all(request)
                    assert not migration.done()
                    wait([migration], timeout=0.05)
            else:
                migration = pool.submit(migrate, services.database)
        migration.result(timeout=60)
    assert is_current(services.database)
    services.database.close()


@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index")
def test_a_migration_says_what_blocks_it(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LOCK_SECONDS", 0.05), ("LOCK_PAUSE_SECONDS", 0.0), ("LOCK_TRIES", 3)):
        monkeypatch.setattr(f"app.migrate.{name}", value)
    services = Services.of(settings)
    migrate(services.database, BEFORE_AN_ALTER_TABLE)
    with services.database.read() as dump:
        read_all(dump)
        if dump.get_bind().dialect.name == "postgresql":
            with pytest.raises(MigrationBlocked, match="keep open"):
                migrate(services.database)
            assert not is_current(services.database)
    migrate(services.database)
    services.database.close()
