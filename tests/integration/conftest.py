"""The service without its workers, on each database, and a client that talks to it in this process."""

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from starlette.routing import BaseRoute

from app.broker import Lane
from app.main import create_app
from app.migrate import migrate
from app.models import repository as models
from app.services import Services
from app.settings import Settings
from tests.helpers.servers import admin, postgres
from worker.worker_pool import WorkerPool


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of each kind. It has the schema if the test uses `services`, else it is empty."""
    migrated = "services" in request.fixturenames
    if request.param == "sqlite":
        database = tmp_path / "test.sqlite3"
        if migrated:
            shutil.copyfile(request.getfixturevalue("sqlite_template"), database)
        yield f"sqlite:///{database}"
        return
    url: str = request.getfixturevalue("postgres_url")
    name = f"test_{secrets.token_hex(8)}"
    template = request.getfixturevalue("postgres_template") if migrated else "template1"
    admin(url, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield url.rpartition("/")[0] + f"/{name}"
    admin(url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(home=tmp_path, database_url=database_url)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the schema and nothing in it: copying it is faster than migrating."""
    services = Services.of(Settings(home=tmp_path_factory.mktemp("migrated")))
    migrate(services.database)
    services.database.close()
    return services.settings.home / "dpo.sqlite3"


@pytest.fixture(scope="session")
def postgres_template(postgres_url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a PostgreSQL database with the schema and nothing in it."""
    admin(postgres_url, "CREATE DATABASE migrated")
    url = postgres_url.rpartition("/")[0] + "/migrated"
    services = Services.of(Settings(home=tmp_path_factory.mktemp("migrated"), database_url=url))
    migrate(services.database)
    services.database.close()
    return "migrated"


@pytest.fixture
def services(settings: Settings) -> Iterator[Services]:
    """Services on a migrated database, with one base model registered as a worker would do it."""
    opened = Services.of(settings)
    with opened.database.write() as session:
        models.register(session, "tiny", "r1", {"architecture": "LlamaForCausalLM"})
    yield opened
    opened.database.close()


@pytest.fixture
def cpu_worker(services: Services) -> Iterator[WorkerPool]:
    """A worker of the CPU lane that does what it is told. Its work in hand ends with the test."""
    worker = WorkerPool(services, Lane.CPU)
    yield worker
    worker.stop()
    for thread in list(worker._in_hand):
        thread.join()
    worker.reader.close()


@pytest.fixture(scope="session")
def routes(tmp_path_factory: pytest.TempPathFactory) -> list[BaseRoute]:
    """The routes of each app. They keep nothing of a test, and FastAPI prepares each in 0.1 s at its first request."""
    return create_app(Settings(home=tmp_path_factory.mktemp("routes"))).router.routes


@pytest.fixture
def client(settings: Settings, services: Services, routes: list[BaseRoute]) -> Iterator[TestClient]:
    """A client with the admin key; server errors answer 500 instead of raising here."""
    headers = {"Authorization": f"Bearer {settings.admin_key}"}
    app = create_app(settings)
    app.router.routes = routes
    with TestClient(app, base_url="http://localhost", headers=headers, raise_server_exceptions=False) as test_client:
        yield test_client
