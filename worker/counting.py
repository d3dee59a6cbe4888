"""Count the tokens of files and render their rows as a model reads them. The reader does this."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.models import repository as models
from app.services import Services
from app.spec.json_types import JsonObject
from app.stored_content import ContentDamaged
from worker.base_models import BaseModels
from worker.model_files import point_to
from worker.model_folder import ModelGone
from worker.reader.client import Reader
from worker.waiting import Check


@dataclass(frozen=True)
class CountRequest:
    """One file to count."""

    dataset: Path
    recipe: JsonObject
    """How to read the file. `worker/trainer/counting.py` says which fields it has."""
    rows: int
    """Number of rows that the check of the file kept."""
    sample: int | None = None
    """Maximum number of rows to count; None leaves it to the program."""

    def as_json(self) -> JsonObject:
        fields = {"dataset": str(self.dataset), "recipe": self.recipe, "rows": self.rows}
        return fields if self.sample is None else fields | {"sample": self.sample}


def place_tokenizer(
    services: Services, base_models: BaseModels, model: models.ResolvedModel, folder: Path, check: Check
) -> None:
    """Put the tokenizer files of `model` at `folder`, which must not exist, or a file with the path of their folder.

    Raises `ModelGone`, `ModelUnavailable`, or what `check` raises.
    """
    if model.prefix is None:
        point_to(folder, base_models.locate(model.base_model, check)[0])
        return
    listed = services.storage.list(model.prefix)
    try:
        model.content.require_complete(listed)
    except ContentDamaged as damage:
        raise ModelGone.damaged(model.name, damage) from damage
    for key, _size in listed:
        if not key.endswith(".safetensors"):
            services.storage.get_file(key, folder / key.removeprefix(f"{model.prefix}/"))


def count(reader: Reader, folder: Path, requests: Sequence[CountRequest], check: Check) -> list[JsonObject]:
    """The token statistics of each file by the tokenizer in `folder`/model, or its `error` {code, message, param}.

    Raises what `Reader.do` raises.
    """
    (folder / "tokens.json").write_text(json.dumps([request.as_json() for request in requests]))
    size = sum(request.dataset.stat().st_size for request in requests)
    results: list[JsonObject] = reader.do(folder, {"name": "count"}, size, check)
    return results
