"""The service without its workers, on each database, and a client that talks to it in this process."""

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.migrate import migrate
from app.models import repository as models
from app.services import Services
from app.settings import Settings
from tests.helpers.servers import admin, postgres


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.sqlite3"
    url: str = request.getfixturevalue("postgres_url")
    name = f"test_{secrets.token_hex(8)}"
    admin(url, f"CREATE DATABASE {name}")
    return url.rpartition("/")[0] + f"/{name}"


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
def services(settings: Settings, request: pytest.FixtureRequest) -> Iterator[Services]:
    """Services on a migrated database, with one base model registered as a worker would do it."""
    url = settings.database_url
    if url.startswith("sqlite:///"):
        shutil.copyfile(request.getfixturevalue("sqlite_template"), url.removeprefix("sqlite:///"))
    else:
        template, name = request.getfixturevalue("postgres_template"), url.rpartition("/")[2]
        admin(request.getfixturevalue("postgres_url"), f"DROP DATABASE {name}")
        admin(request.getfixturevalue("postgres_url"), f"CREATE DATABASE {name} TEMPLATE {template}")
    opened = Services.of(settings)
    with opened.database.write() as session:
        models.register(session, "tiny", "r1", {"architecture": "LlamaForCausalLM"})
    yield opened
    opened.database.close()


@pytest.fixture
def client(settings: Settings, services: Services) -> Iterator[TestClient]:
    """A client with the admin key; server errors answer 500 instead of raising here."""
    headers = {"Authorization": f"Bearer {settings.admin_key}"}
    with TestClient(
        create_app(settings), base_url="http://localhost", headers=headers, raise_server_exceptions=False
    ) as test_client:
        yield test_client
