"""The service without its workers, on each database, and a client that talks to it in this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from app.main import create_app
from app.models import repository as models
from app.services import Services
from app.settings import Settings
from tests.servers import postgres


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
    services = Services.of(Settings(home=tmp_path / "wipe", database_url=url))
    with services.database.engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    services.database.close()
    return url


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(home=tmp_path, database_url=database_url)


@pytest.fixture
def services(settings: Settings) -> Iterator[Services]:
    """Migrated, with a base model registered as a worker would."""
    found = Services.of(settings)
    found.migrate()
    with found.database.write() as session:
        models.register(session, "tiny", "r1", {"architecture": "LlamaForCausalLM"})
    yield found
    found.database.close()


@pytest.fixture
def client(settings: Settings, services: Services) -> Iterator[TestClient]:
    """A client with the admin key; server errors answer 500 instead of raising here."""
    headers = {"Authorization": f"Bearer {settings.admin_key}"}
    with TestClient(
        create_app(settings), base_url="http://localhost", headers=headers, raise_server_exceptions=False
    ) as found:
        yield found
