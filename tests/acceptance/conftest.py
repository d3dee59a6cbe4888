"""Models and data of the acceptance tests, made here."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.service import Running, running
from tests.tiny_model import make_tiny_model

WORDS = ["sun", "moon", "star", "rain", "snow", "wind", "leaf", "tree", "bird", "fish"]


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Preference pairs in which the answer that repeats the question's word is preferred."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        asked, other = generator.sample(WORDS, 2)
        rows.append({"prompt": f"say {asked}: ", "chosen": f"{asked} it is", "rejected": f"no {other} at all"})
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


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
