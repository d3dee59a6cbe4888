"""Count files in tokens of a model, and render their rows as it would read them: by a program of the trainer.

It is a process of its own, in which no torch is loaded; it ends with the lease under which it was asked for.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.models import repository as models
from app.services import Services
from worker.base_models import BaseModels
from worker.lease import Lease, LeaseLost
from worker.processes import kill_group, trainer_environment


@dataclass(frozen=True)
class Count:
    """What to count: the file `dataset` by `recipe` (as worker/trainer/counting.py reads it), of which the check kept
    `rows`; of more than `sample` of them a sample.
    """

    dataset: Path
    recipe: dict[str, Any]
    rows: int
    sample: int | None = None

    def as_json(self) -> dict[str, Any]:
        asked = {"dataset": str(self.dataset), "recipe": self.recipe, "rows": self.rows}
        return asked if self.sample is None else asked | {"sample": self.sample}


def place_tokenizer(services: Services, base_models: BaseModels, model: models.ResolvedModel, place: Path) -> None:
    """Put the tokenizer files of `model` at `place`. Raises `ModelUnavailable`."""
    if model.prefix is None:
        place.symlink_to(base_models.locate(model.base_model)[0].resolve(), target_is_directory=True)
        return
    for key, _size in services.storage.list(model.prefix):
        if not key.endswith(".safetensors"):
            services.storage.get_file(key, place / key.removeprefix(f"{model.prefix}/"))


def count(folder: Path, wanted: Sequence[Count], lease: Lease) -> list[dict[str, Any]]:
    """What the tokenizer in `folder`/model makes of each file: its lengths, or an `error` {code, message, param}."""
    (folder / "tokens.json").write_text(json.dumps([one.as_json() for one in wanted]))
    found: list[dict[str, Any]] = run_program("worker.trainer.tokens", folder, lease)
    return found


def run_program(module: str, folder: Path, lease: Lease) -> Any:
    """Run a module of the trainer on the folder; returns what it prints, a line of JSON. Raises `LeaseLost`."""
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,
            env=trainer_environment() | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    lease.on_lost(lambda: kill_group(process))
    written, _ = process.communicate()
    if lease.lost:
        raise LeaseLost
    if process.returncode != 0:
        raise RuntimeError((folder / "log").read_text(errors="replace")[-2000:])
    return json.loads(written.splitlines()[-1])
