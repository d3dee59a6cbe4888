"""PostgreSQL behind a real PgBouncer: each transaction may run in another session of the server."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from sqlalchemy import text, update
from sqlalchemy.exc import OperationalError

from app import database as database_module
from app.database import Database, now
from app.migrate import migrate
from app.projects.tables import Project
from tests.helpers.servers import pgbouncer, postgres_server, postgres_url

CLIENTS, ROUNDS = 8, 40


@pytest.fixture
def url() -> Iterator[str]:
    with postgres_server() as server, pgbouncer(server) as pooler:
        yield postgres_url(pooler.port)


def test_many_clients_share_few_sessions_and_leave_nothing_in_them(url: str) -> None:
    """A statement that the driver had prepared in one session would be missing in the next."""
    database = Database(url)
    migrate(database)

    def work(number: int) -> None:
        for _ in range(ROUNDS):
            with database.write() as session:
                session.execute(update(Project).where(Project.id == "default").values(max_running_jobs=number))
            with database.read() as session:
                now(session)

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(work, range(CLIENTS)))
    with psycopg.connect(url.replace("postgresql+psycopg", "postgresql")) as connection:
        assert connection.execute("SHOW idle_in_transaction_session_timeout").fetchone() == ("0",)
        assert connection.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)
    database.close()


def test_a_writer_that_stands_still_loses_its_lock(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(url)
    migrate(database)
    monkeypatch.setattr(database_module, "IDLE_SECONDS", 1)
    with pytest.raises(OperationalError), database.write() as frozen:
        frozen.execute(text("SELECT 1 FROM projects WHERE id = 'default' FOR UPDATE"))
        with database.write() as other:  # waits until the server has ended the first
            other.execute(text("SELECT 1 FROM projects WHERE id = 'default' FOR UPDATE"))
        frozen.execute(text("SELECT 1"))
    database.close()
