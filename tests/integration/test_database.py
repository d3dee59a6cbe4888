"""The schema and the session style, on SQLite and PostgreSQL."""

import threading
import time

from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, select

from app.database import Base, database_now
from app.keys.schemas import KeySpec
from app.services import Services
from app.settings import Settings


def test_migrations_go_up_down_and_up_and_agree_with_the_models(settings: Settings) -> None:
    services = Services.of(settings)
    services.migrate("head")
    services.migrate("base")
    assert set(inspect(services.database.engine).get_table_names()) <= {"alembic_version"}
    assert not services.migrated()
    services.migrate("head")
    assert services.migrated()
    with services.database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
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


def test_writers_that_read_first_wait_for_each_other(services: Services) -> None:
    """On SQLite a deferred transaction would fail at once with 'database is locked'."""
    keys, failures = 8, list[BaseException]()

    def create(number: int) -> None:
        try:
            services.keys.create(KeySpec(name=f"key {number}"))
            with services.database.write() as session:
                session.scalars(select(database_now())).one()
                session.execute(Base.metadata.tables["api_keys"].update().values(name="read, then written"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(keys)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with services.database.read() as session:
        assert len(session.execute(select(Base.metadata.tables["api_keys"])).all()) == keys
