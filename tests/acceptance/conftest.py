"""Models and data of the acceptance tests, made here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.service import Running, running
from tests.helpers.tiny_model import make_tiny_model


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A DPO_HOME with one base model, `tiny`."""
    make_tiny_model(tmp_path / "home" / "models" / "tiny")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One service on the embedded default for those tests of a module that leave it running."""
    home = tmp_path_factory.mktemp("shared") / "home"
    make_tiny_model(home / "models" / "tiny")
    more = {
        "DPO_RATE_LIMIT": "0", "DPO_PRIVATE_WEBHOOKS": "localhost", "DPO_PRIVATE_JUDGES": "localhost",
        "WANDB_MODE": "offline", "WANDB_DIR": str(home),
    }  # fmt: skip
    with running(home, more) as service:
        yield service
