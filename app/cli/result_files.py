"""The commands of evaluations and labellings: list, show, watch, report, download, cancel."""

import sys
from collections.abc import Callable
from typing import Annotated, NoReturn
from urllib.parse import quote

import typer
from rich.console import Console

from app.cli.client import Client
from app.cli.describe import describe_gate
from app.cli.output import Json, Limit, Output, emit, emit_table
from app.cli.watch import exit_status, watch
from app.evaluations.figures import figures
from app.spec.json_types import JsonObject


def follow(client: Client, path: str, as_json: bool) -> NoReturn:
    """Follow the job at `path` to its end, print its result, and exit with its status."""
    job = watch(client, path, Console(stderr=as_json))
    text = f"{job['id']}: {job['status']}"
    if job["error"]:
        text += f"\n{job['error']['message']}"
    if job.get("file"):
        text += f"\n{'file':<32} {job['file']}"
    for figure in figures(job["metrics"] or {}):
        text += f"\n{figure.name:<32} {figure}"
    for gate in job["gates"]:
        text += f"\n{describe_gate(gate)}"
    emit(job, as_json, text)
    raise typer.Exit(exit_status(job))


def group_of(noun: str, summary: str, columns: list[str], cells: Callable[[JsonObject], JsonObject]) -> typer.Typer:
    """The commands of one kind of jobs. The list shows `columns`; `cells` makes those that are no field of a row."""
    group, root = typer.Typer(help=summary, no_args_is_help=True), f"/{noun}s"
    a_noun = f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
    JobId = Annotated[str, typer.Argument(metavar=f"{noun}_id")]  # noqa: N806 - a type

    def path_of(job_id: str) -> str:
        return f"{root}/{quote(job_id, safe='')}"

    @group.command("list", help=f"{noun.capitalize()}s, newest first.")
    def list_jobs(limit: Limit = 20, as_json: Json = False) -> None:
        rows = list(Client().pages(root, limit))
        emit_table(rows if as_json else [row | cells(row) for row in rows], columns, as_json)

    @group.command("show", help=f"One {noun}.")
    def show_job(job_id: JobId, as_json: Json = False) -> None:
        fields = Client().request("GET", path_of(job_id))
        shown = (f"{key}: {value}" for key, value in fields.items() if value not in (None, [], {}))
        emit(fields, as_json, "\n".join(shown))

    @group.command(
        "watch",
        help=f"Follow {a_noun} to its end. Exit status: 0 succeeded, 1 failed, 3 cancelled, 4 a gate not met.",
    )
    def watch_job(job_id: JobId, as_json: Json = False) -> None:
        follow(Client(), path_of(job_id), as_json)

    @group.command("report", help=f"All figures of {a_noun}, as JSON.")
    def report_job(
        job_id: JobId,
        _as_json: Annotated[bool, typer.Option("--json", help="The same: a report is JSON in any case.")] = False,
    ) -> None:
        with Client().stream("GET", f"{path_of(job_id)}/report") as response:
            for chunk in response.iter_bytes():
                sys.stdout.buffer.write(chunk)

    @group.command("download", help=f"Download {a_noun}, its report and its other files into a folder.")
    def download_job(job_id: JobId, output: Output, as_json: Json = False) -> None:
        Client().download(f"{path_of(job_id)}/download", output)
        emit({noun: job_id, "folder": str(output)}, as_json, str(output))

    @group.command("cancel", help=f"Cancel {a_noun}.")
    def cancel_job(job_id: JobId, as_json: Json = False) -> None:
        job = Client().request("POST", f"{path_of(job_id)}/cancel")
        emit(job, as_json, f"{job['id']}: {job['status']}")

    return group
