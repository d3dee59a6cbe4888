"""`dpo pipelines`: stages whose inputs are outputs of others, in rounds."""

import time
from pathlib import Path
from typing import Annotated, NoReturn
from urllib.parse import quote

import typer
from rich.console import Console

from app.cli.client import Client
from app.cli.output import Json, Limit, emit, emit_table, plain, read_body
from app.cli.uploads import IdempotencyKey, Uploads, upload_files
from app.cli.watch import EXIT_STATUS, GATE_NOT_MET
from app.spec.json_types import JsonObject

pipelines = typer.Typer(help="Pipelines of jobs, evaluations and labellings.", no_args_is_help=True)
PATH, POLL_SECONDS = "/pipelines", 1.0


def _path(pipeline_id: str) -> str:
    return f"{PATH}/{quote(pipeline_id, safe='')}"


@pipelines.command("create")
def pipelines_create(
    spec: Annotated[Path, typer.Option(help="The body as a JSON file; it may name files by path. '-' for stdin.")],
    idempotency_key: IdempotencyKey = "",
    follow: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    as_json: Json = False,
) -> None:
    """Start a pipeline. With --watch, the exit status is that of `dpo pipelines watch`."""
    client, body = Client(), read_body(spec)
    with Uploads(client, idempotency_key) as uploads:
        upload_files(uploads.add, body)
        started = client.request("POST", PATH, json=body, headers=uploads.headers)
    if follow:
        _follow(client, started["id"], as_json)
    emit(started, as_json, f"{started['id']}: {started['status']}\nfollow it: dpo pipelines watch {started['id']}")


@pipelines.command("list")
def pipelines_list(limit: Limit = 20, as_json: Json = False) -> None:
    """Pipelines, newest first."""
    rows = list(Client().pages(PATH, limit))
    cells = [row | {"round": f"{row['round']} of {row['rounds']}"} for row in rows]
    emit_table(rows if as_json else cells, ["id", "status", "name", "round", "model"], as_json)


@pipelines.command("show")
def pipelines_show(pipeline_id: str, as_json: Json = False) -> None:
    """One pipeline, with its stages in each round."""
    pipeline = Client().request("GET", _path(pipeline_id))
    emit(pipeline, as_json, _described(pipeline))


@pipelines.command("watch")
def pipelines_watch(pipeline_id: str, as_json: Json = False) -> None:
    """Follow a pipeline to its end.

    Exit status: 0 succeeded, 1 failed, 3 cancelled, 4 no round met its gates.
    """
    _follow(Client(), pipeline_id, as_json)


def _follow(client: Client, pipeline_id: str, as_json: bool) -> NoReturn:
    console, shown = Console(stderr=as_json), dict[tuple[int, str], str]()
    client.waits = True
    while True:
        pipeline = client.request("GET", _path(pipeline_id))
        for entry in pipeline["history"]:
            for stage in entry["stages"]:
                key = entry["round"], stage["name"]
                if stage["status"] not in ("waiting", shown.get(key)):
                    shown[key] = stage["status"]
                    text = f"round {entry['round']}  {stage['name']:<16} {stage['status']:<18} {stage['id']}"
                    console.print(plain(text), highlight=False, markup=False, soft_wrap=True)
        if pipeline["status"] in EXIT_STATUS:
            break
        time.sleep(POLL_SECONDS)
    emit(pipeline, as_json, _described(pipeline))
    status = EXIT_STATUS[pipeline["status"]]
    gates = [gate for entry in pipeline["history"] for stage in entry["stages"] for gate in stage["gates"]]
    gated = any(gate["met"] is False for gate in gates)
    raise typer.Exit(GATE_NOT_MET if status == 0 and gated and pipeline["model"] is None else status)


@pipelines.command("cancel")
def pipelines_cancel(pipeline_id: str, as_json: Json = False) -> None:
    """Cancel a pipeline and its unfinished jobs."""
    pipeline = Client().request("POST", f"{_path(pipeline_id)}/cancel")
    emit(pipeline, as_json, f"{pipeline['id']}: {pipeline['status']}")


def _described(pipeline: JsonObject) -> str:
    lines = [f"{pipeline['id']}: {pipeline['status']}"]
    if pipeline["error"]:
        lines.append(pipeline["error"]["message"])
    for entry in pipeline["history"]:
        value = "" if entry["value"] is None else f"  {entry['value']:.4f}"
        lines.append(f"round {entry['round']}: {entry['model'] or ''}{value}")
        lines += [f"  {stage['name']:<16} {stage['status']:<18} {stage['id'] or ''}" for stage in entry["stages"]]
    if pipeline["model"]:
        lines.append(f"result: {pipeline['model']}")
    return "\n".join(lines)
