"""`dpo models`: base models, and models that a service trained."""

from typing import Annotated
from urllib.parse import quote

import typer

from app.cli.client import Client
from app.cli.output import Json, Output, emit, emit_table

models = typer.Typer(help="Base models, and models trained here.", no_args_is_help=True)


@models.command("list")
def models_list(
    limit: Annotated[int, typer.Option(min=1, help="How many: base models first, then your own, newest first.")] = 1000,
    as_json: Json = False,
) -> None:
    """Base models that workers serve, and models trained here."""
    emit_table(list(Client().pages("/models", limit)), ["id", "kind", "base_model", "owned_by"], as_json)


@models.command("download")
def models_download(
    model: str,
    output: Output,
    merged: Annotated[bool, typer.Option("--merged", help="Whole weights, with the adapter merged in.")] = False,
    dtype: Annotated[str, typer.Option(help="The type of merged weights: bf16 or fp16.")] = "bf16",
    as_json: Json = False,
) -> None:
    """Download a model trained here, or a checkpoint, into a folder."""
    Client().download_model(model, output, {"format": "merged", "dtype": dtype} if merged else {})
    emit({"model": model, "folder": str(output)}, as_json, str(output))


@models.command("lineage")
def models_lineage(model: str, as_json: Json = False) -> None:
    """The trainings that led from the base model to this model."""
    lineage = Client().request("GET", f"/models/{quote(model, safe=':')}/lineage")
    text = f"{lineage['base_model']} (revision {lineage['base_revision'] or 'unknown'})"
    for step in lineage["steps"]:
        method = ("SFT, then " if step["sft"] else "") + step["method"]
        text += f"\n  {method} on {', '.join(step['files'])} by {step['job']}\n{step['model']}"
    emit(lineage, as_json, text)


@models.command("delete")
def models_delete(model: str, as_json: Json = False) -> None:
    """Delete a model trained here, unless something needs it."""
    emit(Client().request("DELETE", f"/models/{quote(model, safe=':')}"), as_json, f"{model}: deleted")
