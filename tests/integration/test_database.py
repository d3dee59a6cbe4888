"""The schema and transactions, on SQLite and PostgreSQL."""

import os
import subprocess
import sys
import threading
import time

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, select, text, update
from sqlalchemy.exc import OperationalError

from app import database
from app.database import Database, Table, database_now
from app.jobs import queries
from app.jobs import queue as job_queue
from app.jobs.states import Status
from app.jobs.tables import Job
from app.keys.schemas import KeySpec
from app.migrate import is_current, migrate
from app.services import Services
from app.settings import Settings
from tests.helpers.jobs import make_job
from tests.helpers.servers import wait_until


def test_migrations_go_up_down_and_up_and_agree_with_the_models(settings: Settings) -> None:
    services = Services.of(settings)
    migrate(services.database, "head")
    migrate(services.database, "base")
    assert set(inspect(services.database.engine).get_table_names()) <= {"alembic_version"}
    assert not is_current(services.database)
    migrate(services.database, "head")
    assert is_current(services.database)
    with services.database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []
    services.database.close()


def test_the_database_clock_has_fractions_of_a_second_and_moves_inside_a_transaction(services: Services) -> None:
    with services.database.write() as session:
        first = session.scalars(select(database_now())).one()
        values = {first}
        deadline = time.monotonic() + 5
        while len(values) < 20 and time.monotonic() < deadline:
            values.add(session.scalars(select(database_now())).one())
    assert len(values) == 20
    assert any(value % 1 for value in values)
    assert abs(first - time.time()) < 5


def test_transactions_that_read_and_then_write_wait_for_each_other(services: Services) -> None:
    """On SQLite a deferred transaction would fail at once with 'database is locked'."""
    keys, failures = 8, list[BaseException]()
    # All threads write one row. PostgreSQL could lock several rows in different orders, which is a deadlock.
    services.keys.create(KeySpec(name="shared"))
    table = Table.metadata.tables["api_keys"]
    shared = table.update().where(table.c.name == "shared").values(last_used_at=database_now())

    def create(number: int) -> None:
        try:
            services.keys.create(KeySpec(name=f"key {number}"))
            with services.database.write() as session:
                session.scalars(select(database_now())).one()
                session.execute(shared)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(keys)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with services.database.read() as session:
        assert len(session.execute(select(table)).all()) == keys + 1


def test_a_database_one_version_ahead_serves_this_version(services: Services) -> None:
    """The schema is migrated first. The old processes go on until each is replaced."""
    with services.database.write() as session:
        session.execute(text("UPDATE alembic_version SET version_num = 'next'"))
        session.execute(text("ALTER TABLE jobs ADD COLUMN what_the_next_version_adds VARCHAR"))
    assert is_current(services.database)
    migrate(services.database)
    job = make_job(services)
    with services.database.write() as session:
        assert job_queue.claim(session, Status.QUEUED, "an old worker") is not None
        assert queries.get(session, "default", job) is not None


def test_the_last_migration_only_adds(settings: Settings) -> None:
    """Rows of the previous version still fit: no table or column is gone, and a new column needs no value."""
    services = Services.of(settings)
    migrate(services.database, "head")
    migrate(services.database, "-1")
    old_columns = optional_columns(services)
    migrate(services.database, "head")
    new_columns = optional_columns(services)
    services.database.close()
    for table, names in old_columns.items():
        assert names.keys() <= new_columns[table].keys()
        for name in new_columns[table].keys() - names.keys():
            assert new_columns[table][name], f"{table}.{name} must be nullable or have a default"
        assert all(new_columns[table][name] or not names[name] for name in names), "an optional column became required"


def optional_columns(services: Services) -> dict[str, dict[str, bool]]:
    """By table and column: whether a row can be written without a value."""
    inspector = inspect(services.database.engine)
    return {
        table: {
            column["name"]: bool(column["nullable"] or column["default"] is not None)
            for column in inspector.get_columns(table)
        }
        for table in inspector.get_table_names()
    }


def test_a_process_frozen_in_a_transaction_loses_its_lock(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen worker holds its connection and the lock on its job's row. Nobody else could take the lease."""
    url = services.settings.database_url
    if url.startswith("sqlite"):
        return  # SQLite serves one machine, which freezes as a whole
    monkeypatch.setattr(database, "IDLE_SECONDS", 1)
    frozen, job_id = Database(url), make_job(services)
    with pytest.raises(OperationalError, match="idle-in-transaction timeout"), frozen.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(priority=7))

        def free() -> bool:
            with services.database.write() as other_session:
                unlocked = select(Job.id).where(Job.id == job_id).with_for_update(skip_locked=True)
                return other_session.scalar(unlocked) is not None

        assert not free()
        wait_until(free, "the lock")
        session.execute(update(Job).where(Job.id == job_id).values(priority=8))
    frozen.close()
    with services.database.read() as session:
        assert session.get_one(Job, job_id).priority == 0


def test_many_processes_that_migrate_at_once_all_succeed(settings: Settings) -> None:
    """Every part of a deployment may migrate when it starts. One migrates, and the others wait for it."""
    environment = os.environ | {"DPO_HOME": str(settings.home), "DPO_DATABASE_URL": settings.database_url}
    command = [sys.executable, "-m", "app.cli.main", "migrate"]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(4)
    ]
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    migrated = Database(settings.database_url)
    assert is_current(migrated)
    migrated.close()
