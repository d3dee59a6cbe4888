"""Migrates the database to this version's schema, by Alembic."""

import time
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

import migrations
from app.database import Database
from app.errors import Unavailable

LOCK = 0x64706F6D
"""Key of the advisory lock that a migration takes: an arbitrary number that nothing else uses."""
LOCK_SECONDS, LOCK_PAUSE_SECONDS, LOCK_TRIES = 2.0, 5.0, 120
"""How long a migration waits for a table, how long it then lets others work, and how often it tries: ten minutes."""

log = structlog.get_logger(__name__)


class MigrationBlocked(Unavailable):
    """A migration could not get its locks."""


def migrate(database: Database, revision: str = "head") -> None:
    """Migrate the database up or down to `revision`. With `head`, a later schema than this version's stays.

    Several processes may call it at the same time. One migrates, and the others wait for it. Others go on to read and
    write: a migration that has to wait for a lock on PostgreSQL gives up within seconds, and tries again later. Raises
    `MigrationBlocked` if a transaction stays open for too long.
    """
    if revision == "head" and is_current(database):
        return
    for remaining in reversed(range(LOCK_TRIES)):
        try:
            _migrate_once(database, revision)
        except OperationalError as error:
            if not isinstance(error.orig, LockNotAvailable):
                raise
            if remaining == 0:
                raise MigrationBlocked(
                    "A transaction that others keep open blocks the migration: a dump, or an idle session of psql. "
                    "End it, and migrate again."
                ) from error
            log.warning("migration waits", reason="another transaction is open", tries_left=remaining)
            time.sleep(LOCK_PAUSE_SECONDS)
        else:
            return


def _migrate_once(database: Database, revision: str) -> None:
    """Migrate in one transaction. Raises `OperationalError` if a lock cannot be had within `LOCK_SECONDS`."""
    with database.locked(LOCK) as connection:
        if revision == "head" and _is_current(connection):
            return
        if connection.dialect.name == "postgresql":
            # Whoever asks for a table after a waiting ALTER TABLE waits behind it, readers included.
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{int(LOCK_SECONDS * 1000)}ms'")
        config = alembic_config()
        config.attributes["connection"] = connection
        if revision in ("base", "-1") or revision in _behind(connection, config):
            command.downgrade(config, revision)
        else:
            command.upgrade(config, revision)
        if connection.dialect.name == "sqlite":  # which did not check them, see `Database.locked`
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
            if broken:
                raise RuntimeError(f"the migration would leave rows that refer to missing ones: {broken[:3]}")


def is_current(database: Database) -> bool:
    """Whether the database has this version's schema or a later one. A later schema only adds to this one."""
    with database.engine.connect() as connection:
        return _is_current(connection)


def _is_current(connection: Connection) -> bool:
    current = MigrationContext.configure(connection).get_current_revision()
    scripts = ScriptDirectory.from_config(alembic_config())
    older = {script.revision for script in scripts.walk_revisions()} - {scripts.get_current_head()}
    return current is not None and current not in older


def alembic_config() -> Config:
    """Alembic, pointed at the `migrations` package."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    return config


def _behind(connection: Connection, config: Config) -> set[str]:
    """The revisions before the database's current one."""
    current = MigrationContext.configure(connection).get_current_revision()
    scripts = ScriptDirectory.from_config(config)
    if current is None or current not in {script.revision for script in scripts.walk_revisions()}:
        return set()
    return {script.revision for script in scripts.iterate_revisions(current, "base")} - {current}
