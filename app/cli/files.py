"""`dpo files`: datasets, checked on this machine or stored by a service."""

import shlex
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from pydantic import ValidationError

from app.cli.client import Client
from app.cli.describe import describe_report
from app.cli.output import Json, Limit, emit, emit_table
from app.cli.tokens import count_tokens
from app.settings import Settings
from app.spec.datasets.check import survey
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.rendering import RenderingSettings

files = typer.Typer(help="Datasets.", no_args_is_help=True)


def _mapping(value: str) -> Mapping | None:
    """A mapping from the command line: JSON, or the name of a JSON file."""
    if not value:
        return None
    try:
        text = value if value.lstrip().startswith("{") else Path(value).read_text()
        return Mapping.model_validate_json(text)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--mapping") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise typer.BadParameter(f"{field}: {first['msg']}".lstrip(": "), param_hint="--mapping") from error


MappingOption = Annotated[
    str,
    typer.Option("--mapping", help='Which columns hold what: JSON such as \'{"prompt": "question", …}\', or a file.'),
]


TemplateOption = Annotated[
    bool | None,
    typer.Option(help="Always or never use the model's chat template. Default: use it, except on templated prompts."),
]


FoldOption = Annotated[
    bool | None, typer.Option("--fold-system", help="Write the system prompt into the first user turn.")
]


@files.command("check")
def files_check(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    mapping: MappingOption = "",
    model: Annotated[str, typer.Option(help="Also count tokens, for a folder or a model of DPO_MODELS_DIR.")] = "",
    max_length: Annotated[int, typer.Option(min=16, help="Tokens of a prompt and one answer, with --model.")] = 2048,
    chat_template: TemplateOption = None,
    fold_system: FoldOption = None,
    as_json: Json = False,
) -> None:
    """Check a dataset on this machine, without a service. Exit status: 0 it can be trained on, 1 it cannot."""
    columns = _mapping(mapping)
    with path.open("rb") as file:
        findings = survey(file, columns)
    report = findings.as_json()
    if model and report["valid"]:
        folder = Path(model) if Path(model).is_dir() else Settings().models_dir / model
        rendering = RenderingSettings(chat_template=chat_template, fold_system=fold_system)
        report["tokens"] = count_tokens(path, folder, model, max_length, report, columns, rendering)
    emit(report, as_json, describe_report(report, shlex.quote(str(path))))
    raise typer.Exit(0 if report["valid"] else 1)


@files.command("report")
def files_report(
    file_id: str,
    model: Annotated[str, typer.Option(help="Count tokens as this model does.")] = "",
    max_length: Annotated[int | None, typer.Option(min=16, help="Tokens of a prompt and one answer.")] = None,
    chat_template: TemplateOption = None,
    fold_system: FoldOption = None,
    as_json: Json = False,
) -> None:
    """The service's report on an uploaded file. Waits until it is ready."""
    options = {
        "model": model or None,
        "max_length": max_length,
        "chat_template": chat_template,
        "fold_system": fold_system,
    }
    params = {name: value for name, value in options.items() if value is not None}
    report = Client().when_ready("GET", f"/files/{quote(file_id, safe='')}/report", params=params)
    emit(report, as_json, describe_report(report))


@files.command("upload")
def files_upload(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    mapping: MappingOption = "",
    expires_in: Annotated[
        int | None, typer.Option(min=3600, max=2592000, help="Seconds until it is deleted automatically.")
    ] = None,
    idempotency_key: Annotated[
        str, typer.Option(help="Commands with the same key and file make one file, however often they run in a day.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Upload a dataset and print its id."""
    columns = _mapping(mapping)
    form: dict[str, str] = {} if columns is None else {"mapping": columns.model_dump_json(exclude_none=True)}
    if expires_in is not None:
        form |= {"expires_after[anchor]": "created_at", "expires_after[seconds]": str(expires_in)}
    file = Client().upload(path, form, idempotency_key)
    emit(file, as_json, file["id"])


@files.command("delete")
def files_delete(file_id: str, as_json: Json = False) -> None:
    """Delete a file. Jobs that already use it keep their copy until they end."""
    emit(Client().request("DELETE", f"/files/{quote(file_id, safe='')}"), as_json, f"{file_id}: deleted")


@files.command("list")
def files_list(limit: Limit = 100, as_json: Json = False) -> None:
    """The files of this key's project, newest first."""
    rows = list(Client().pages("/files", limit))
    emit_table(rows, ["id", "filename", "purpose", "bytes"], as_json)
