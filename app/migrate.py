"""The schema of the database: bringing it to this version's, by Alembic."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

import migrations
from app.database import Database


def migrate(database: Database, revision: str = "head") -> None:
    """Bring the database to `revision`, up or down. One that is ahead of this version stays as it is."""
    if revision == "head" and is_current(database):
        return
    with database.engine.begin() as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        if revision in ("base", "-1") or revision in _behind(connection, config):
            command.downgrade(config, revision)
        else:
            command.upgrade(config, revision)


def is_current(database: Database) -> bool:
    """Whether the database has the schema of this version, or that of a later one: the next only adds to it."""
    with database.engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    scripts = ScriptDirectory.from_config(alembic_config())
    before = {script.revision for script in scripts.walk_revisions()} - {scripts.get_current_head()}
    return current is not None and current not in before


def alembic_config() -> Config:
    """Alembic, pointed at the `migrations` package."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    return config


def _behind(connection: Connection, config: Config) -> set[str]:
    """The revisions that the database has left behind."""
    current = MigrationContext.configure(connection).get_current_revision()
    scripts = ScriptDirectory.from_config(config)
    if current is None or current not in {script.revision for script in scripts.walk_revisions()}:
        return set()
    return {script.revision for script in scripts.iterate_revisions(current, "base")} - {current}
