"""The services of the acceptance tests, each with one tiny base model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.documents import BASES
from tests.helpers.service import Running, running, server_stack
from tests.helpers.tiny_model import make_tiny_model


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A DPO_HOME with one base model, `tiny`."""
    make_tiny_model(tmp_path / "home" / "models" / "tiny")
    return tmp_path / "home"


SETTINGS = {
    "DPO_RATE_LIMIT": "0", "DPO_PRIVATE_WEBHOOKS": "localhost:*", "DPO_PRIVATE_JUDGES": "localhost:*", "WANDB_MODE": "offline",
}  # fmt: skip


@contextmanager
def shared_service(home: Path, environment: dict[str, str]) -> Iterator[Running]:
    """A service with the base model `tiny`, and with those of the documents. It may call webhooks and judges here."""
    for name in ("tiny", *BASES):
        make_tiny_model(home / "models" / name)
    with running(home, {**SETTINGS, "WANDB_DIR": str(home), **environment}) as service:
        yield service


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One service on the embedded stack, for all tests of a test process that leave it running."""
    with shared_service(tmp_path_factory.mktemp("embedded") / "home", {}) as service:
        yield service


@pytest.fixture(scope="package")
def service_on_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same on PostgreSQL, Redis and S3 servers."""
    with (
        server_stack() as environment,
        shared_service(tmp_path_factory.mktemp("servers") / "home", environment) as service,
    ):
        yield service


@pytest.fixture(params=["embedded", "servers"])
def service_on_each_stack(request: pytest.FixtureRequest) -> Running:
    name = "service" if request.param == "embedded" else "service_on_servers"
    service: Running = request.getfixturevalue(name)
    return service
