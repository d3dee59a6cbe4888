"""The schema and transactions, on SQLite and PostgreSQL."""

import os
import subprocess
import sys
import threading
import time
import warnings

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from fastapi.testclient import TestClient
from sqlalchemy import func, inspect, select, text, update
from sqlalchemy.exc import OperationalError, SAWarning
from structlog.testing import capture_logs

from app import database
from app.audit.tables import AuditEvent
from app.database import Database, Table, database_now
from app.jobs import queries
from app.jobs import queue as job_queue
from app.jobs.states import Status
from app.jobs.tables import Job, JobEvent
from app.keys.schemas import KeySpec
from app.migrate import is_current, migrate
from app.services import Services
from app.settings import Settings
from tests.helpers.api import error_of, rows, upload
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
        # SQLite does not tell the direction of an index's columns.
        untold = {"ix_jobs_line"} if connection.dialect.name == "sqlite" else set[str]()
        opts = {"compare_type": True, "include_object": lambda _object, name, *_: name not in untold}
        context = MigrationContext.configure(connection, opts=opts)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*expression-based index", category=UserWarning)
            warnings.filterwarnings("ignore", ".*expression-based index", category=SAWarning)
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


WIDENED = {("job_events", "sequence"), ("sent_requests", "sequence")}
"""Columns whose type a migration has changed: see decision 027."""


def test_migrations_only_add(settings: Settings) -> None:
    """Rows of an earlier version still fit.

    No table or column is gone, none has another type, and a new column needs no value.
    """
    services = Services.of(settings)
    migrate(services.database, "head")
    migrate(services.database, "0008")
    old_columns = columns(services)
    migrate(services.database, "head")
    new_columns = columns(services)
    services.database.close()
    for table, old in old_columns.items():
        new = new_columns[table]
        assert old.keys() <= new.keys()
        for name in new.keys() - old.keys():
            assert new[name][0], f"{table}.{name} must be nullable or have a default"
        for name, (optional, type_name) in old.items():
            assert new[name][0] or not optional, f"{table}.{name} became required"
            assert new[name][1] == type_name or (table, name) in WIDENED, f"{table}.{name} has another type"


def columns(services: Services) -> dict[str, dict[str, tuple[bool, str]]]:
    """By table and column: whether a row can be written without a value, and the type."""
    inspector = inspect(services.database.engine)
    return {
        table: {
            column["name"]: (bool(column["nullable"] or column["default"] is not None), str(column["type"]))
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


LARGEST = 2**31 - 1
"""The largest number of 32 bits."""


def numbered_tables() -> list[str]:
    """The tables whose rows the database numbers."""
    return [table.name for table in Table.metadata.sorted_tables if table.autoincrement_column is not None]


def test_rows_are_numbered_beyond_32_bits(client: TestClient, services: Services) -> None:
    """A service with 500 jobs a day writes so many events in two years."""
    assert sorted(numbered_tables()) == ["audit_events", "job_events", "sent_requests"]
    body = {"model": "tiny", "training_file": upload(client)}

    def create(key: str) -> str:
        answer = client.post("/v1/fine_tuning/jobs", json=body, headers={"Idempotency-Key": key})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    create("one")
    with services.database.write() as session:
        for table in numbered_tables():
            session.execute(text(f"UPDATE {table} SET sequence = {LARGEST} WHERE sequence = 1"))
            if session.get_bind().dialect.name == "postgresql":
                session.execute(text(f"SELECT setval('{table}_sequence_seq', {LARGEST})"))
    job_id = create("two")
    assert create("two") == job_id
    assert len(client.get(f"/v1/fine_tuning/jobs/{job_id}/events").json()["data"]) == 1
    with services.database.read() as session:
        assert session.scalars(select(func.max(JobEvent.sequence))).one() == LARGEST + 1
        assert session.scalars(select(func.max(AuditEvent.sequence))).one() == LARGEST + 2


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_database_error_that_no_request_causes_is_a_logged_500(client: TestClient, services: Services) -> None:
    with services.database.write() as session:
        session.execute(text("ALTER SEQUENCE job_events_sequence_seq MAXVALUE 2"))
    body = {"model": "tiny", "training_file": upload(client)}
    with capture_logs() as logs:
        answers = [client.post("/v1/fine_tuning/jobs", json=body) for _ in range(3)]
    logged = [str(line["exc_info"]) for line in logs if line["event"] == "unexpected error"]
    assert [answer.status_code for answer in answers] == [200, 200, 500]
    error = error_of(answers[2], 500)
    assert error["code"] == "internal_error"
    assert len(logged) == 1 and "reached maximum value of sequence" in logged[0]
    assert rows(services) == (1, 2), "nothing of the refused job is stored"
