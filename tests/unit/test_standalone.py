"""`dpo train` chooses its devices."""

from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from app.spec.job import JobSpec
from tests.helpers.tiny_model import make_tiny_model
from worker import device, standalone
from worker.base_models import describe


@pytest.mark.parametrize(
    ("fields", "gigabytes", "taken"),
    [
        ({}, 8.0, 1),
        ({"adapter": "none"}, 2.0, 2),  # 0.5 GB are the process, and the rest is divided
        ({"adapter": "none", "parallel": {"shard": False}}, 2.0, 1),
        ({"resources": {"gpus": 3}}, 8.0, 3),
        ({"resources": {"gpus": {"max": 9}}}, 8.0, 4),
    ],
)
def test_a_spec_without_a_number_takes_the_fewest_devices_on_which_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], gigabytes: float, taken: int
) -> None:
    base = make_tiny_model(tmp_path / "base")
    details = describe("base", base).details
    details["shape"] |= {"layers": 32, "linears": [["up_proj", 2048, 2048, 32]]}  # 134 million parameters

    class Described:
        def __init__(self) -> None:
            self.details = details

    monkeypatch.setattr(standalone, "describe", lambda *_: Described())
    monkeypatch.setattr(device, "total_memory", lambda: int(4e9 * gigabytes))
    spec = JobSpec.model_validate({"model": "base", "training_file": "x", "method": {"type": "dpo"}, **fields})
    settings = Settings(home=tmp_path, device="cpu", cpu_devices=4)
    assert len(standalone._devices(spec.resolved(), settings, base)) == taken


def test_more_devices_than_there_are_is_refused_with_their_number(tmp_path: Path) -> None:
    spec = JobSpec.model_validate({"model": "base", "training_file": "x", "resources": {"gpus": 3}}).resolved()
    settings = Settings(home=tmp_path, device="cpu", cpu_devices=2)
    with pytest.raises(standalone.UsageError, match=r"3 are wanted. Devices of this machine: 2\."):
        standalone._devices(spec, settings, make_tiny_model(tmp_path / "base"))


def test_a_damaged_base_is_left_to_the_trainer(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    (base / "config.json").write_text("{}")
    spec = JobSpec.model_validate({"model": "base", "training_file": "x"}).resolved()
    assert len(standalone._devices(spec, Settings(home=tmp_path, device="cpu", cpu_devices=2), base)) == 1
