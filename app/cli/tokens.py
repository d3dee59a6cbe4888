"""Counts the tokens of a dataset on this machine. The trainer's own program does it, in its own process."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from app.cli.client import ClientError
from app.programs import command
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.rendering import RenderingSettings
from app.spec.json_types import JsonObject


def count_tokens(
    path: Path,
    model: Path,
    name: str,
    max_length: int,
    report: JsonObject,
    mapping: Mapping | None,
    rendering: RenderingSettings,
) -> JsonObject:
    """The part `tokens` of a report. Raises `ClientError` if the model's tokenizer cannot be used."""
    if not (model / "tokenizer.json").exists():
        raise ClientError(f"{model} has no tokenizer.json: --model is a folder, or the name of one in DPO_MODELS_DIR.")
    recipe = {
        "need": report["kind"],
        "max_length": max_length,
        "loss_on": "answers",
        "mapping": None if mapping is None else mapping.model_dump(mode="json"),
        "rendering": rendering.undated,
    }
    with tempfile.TemporaryDirectory(prefix="dpo-check-") as folder_name:
        folder = Path(folder_name)
        (folder / "model").write_text(str(model.resolve()))
        request = {"dataset": str(path.resolve()), "recipe": recipe, "rows": report["kept"]}
        (folder / "tokens.json").write_text(json.dumps([request]))
        process = subprocess.run(
            command("worker.trainer.tokens", str(folder)),
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    if process.returncode != 0:
        raise ClientError(
            "Tokens cannot be counted (is the worker installed? pip install 'dpo-service[worker]'): "
            + process.stderr[-500:]
        )
    tokens: JsonObject = json.loads(process.stdout.splitlines()[-1])[0]
    if "error" in tokens:
        raise ClientError(tokens["error"]["message"])
    method = "supervised" if report["kind"] == "supervised" else "dpo"
    return {"model": name, "max_length": max_length, "method": method} | tokens
