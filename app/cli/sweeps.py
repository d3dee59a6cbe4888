"""`dpo sweeps`: one training for each point of a grid, and a comparison of them."""

import json
import time
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console

from app.cli.client import Client
from app.cli.output import Json, Limit, emit, emit_table, read_body
from app.cli.uploads import IdempotencyKey, Uploads, upload_files
from app.cli.watch import EXIT_STATUS, GATE_NOT_MET
from app.spec.json_types import JsonObject
from app.spec.metrics import EVALUATION, SUMMARY, VALIDATION

sweeps = typer.Typer(help="Sweeps: a job for each point of a grid.", no_args_is_help=True)
PATH = "/sweeps"
SWEEP_POLL_SECONDS = 2.0
MEASURED = tuple(name for name in SUMMARY if name in VALIDATION)
"""The training metrics in a sweep's table. They come from the last validation."""


def _path(sweep_id: str) -> str:
    return f"{PATH}/{quote(sweep_id, safe='')}"


@sweeps.command("create")
def sweeps_create(
    spec: Annotated[Path, typer.Option(help="The job body as a JSON file; it may name files by path. '-' for stdin.")],
    grid: Annotated[
        list[str], typer.Option(help="FIELD=VALUE,VALUE,…, e.g. beta=0.05,0.1 or adapter.r=8,16. Repeatable.")
    ],
    frontier: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="X Y",
            help="The metrics of the frontier, e.g. evaluations/NAME/kl evaluations/NAME/reward. The default: those of "
            "an evaluation of the type reward_kl with a judge.",
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="The name of the sweep.")] = "",
    idempotency_key: IdempotencyKey = "",
    follow: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    as_json: Json = False,
) -> None:
    """Start a job for each combination of the grid's values.

    With --watch, the exit status is that of `dpo sweeps watch`.
    """
    client, job = Client(), read_body(spec)
    fields = dict(map(_values, grid))
    if len(fields) < len(grid):
        raise typer.BadParameter("names a field twice", param_hint="--grid")
    body: JsonObject = {"job": job, "grid": fields}
    if name:
        body["name"] = name
    if frontier is not None:
        body["frontier"] = dict(zip("xy", frontier, strict=True))
    with Uploads(client, idempotency_key) as uploads:
        upload_files(uploads.add, job)
        sweep = client.request("POST", PATH, json=body, headers=uploads.headers)
    if follow:
        _follow(client, sweep["id"], as_json)
    emit(sweep, as_json, f"{sweep['id']}: {len(sweep['jobs'])} jobs\nfollow it: dpo sweeps watch {sweep['id']}")


def _values(text: str) -> tuple[str, list[object]]:
    """A field of the grid and its values: numbers and words with commas, or a JSON list in brackets."""
    field, sign, values = text.partition("=")
    if not sign or not values:
        raise typer.BadParameter(f"'{text}' is not FIELD=VALUE,VALUE,…", param_hint="--grid")
    if values.startswith("["):
        try:
            json_values: list[object] = json.loads(values)
            return field, json_values
        except json.JSONDecodeError as error:
            raise typer.BadParameter(f"'{values}': {error}", param_hint="--grid") from None
    return field, [_value(value) for value in values.split(",")]


def _value(text: str) -> object:
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value


@sweeps.command("list")
def sweeps_list(limit: Limit = 20, as_json: Json = False) -> None:
    """Sweeps, newest first."""
    rows = list(Client().pages(PATH, limit))
    cells = [row | {"jobs": len(row["jobs"]), "fields": ", ".join(row["grid"])} for row in rows]
    emit_table(rows if as_json else cells, ["id", "status", "name", "jobs", "fields"], as_json)


@sweeps.command("show")
def sweeps_show(sweep_id: str, as_json: Json = False) -> None:
    """The jobs of a sweep, side by side."""
    _show(Client().request("GET", _path(sweep_id)), as_json)


@sweeps.command("watch")
def sweeps_watch(sweep_id: str, as_json: Json = False) -> None:
    """Follow a sweep to its end. Exit status: 0 succeeded, 1 a job failed, 3 cancelled, 4 a quality gate not met."""
    _follow(Client(), sweep_id, as_json)


def _follow(client: Client, sweep_id: str, as_json: bool) -> None:
    console, previous_counts = Console(stderr=as_json), ""
    client.waits = True
    while True:
        sweep = client.request("GET", _path(sweep_id))
        states = [job["status"] for job in sweep["jobs"]]
        states += [evaluation["status"] for job in sweep["jobs"] for evaluation in job["evaluations"].values()]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        if counts != previous_counts:
            console.print(counts, highlight=False)
            previous_counts = counts
        if sweep["status"] != "running":
            break
        time.sleep(SWEEP_POLL_SECONDS)
    _show(sweep, as_json)
    missed = any(gate["met"] is False for job in sweep["jobs"] for gate in job["gates"])
    raise typer.Exit(GATE_NOT_MET if missed and sweep["status"] == "succeeded" else EXIT_STATUS[sweep["status"]])


def _show(sweep: JsonObject, as_json: bool) -> None:
    """Print the jobs of a sweep: their settings, metrics, and which of them are in the Pareto set."""
    frontier = sweep["frontier"] or {"points": []}
    best = {point["job_id"] for point in frontier["points"] if point["pareto"]}
    rows, measured = [], dict.fromkeys(MEASURED)
    for job in sweep["jobs"]:
        metrics = {name: value for name, value in (job["metrics"] or {}).items() if name in MEASURED}
        for name, evaluation in job["evaluations"].items():
            for metric, value in (evaluation["metrics"] or {}).items():
                registered = EVALUATION.get(metric.partition("@")[0])
                if registered is not None and registered.summary:
                    metrics[f"{name}/{metric}"] = value
        measured |= dict.fromkeys(metrics)
        cells = {name: f"{value:.4g}" for name, value in metrics.items()}
        in_pareto_set = "yes" if job["id"] in best else ""
        rows.append({**job["settings"], "status": job["status"], **cells, "pareto": in_pareto_set, "job": job["id"]})
    columns = [*sweep["grid"], "status", *(name for name in measured if any(name in row for row in rows))]
    if best:
        columns.append("pareto")
    if as_json:
        emit(sweep, True, "")
        return
    emit_table(rows, [*columns, "job"], False)
    if best:
        print(f"\nPareto set of {frontier['y']} against {frontier['x']}: {len(best)} of {len(rows)} jobs")
        print(f"a picture: dpo sweeps frontier {sweep['id']} --output frontier.svg")


@sweeps.command("frontier")
def sweeps_frontier(
    sweep_id: str,
    output: Annotated[Path, typer.Option(help="The file to write: .svg for a picture, .csv for a table.")],
    as_json: Json = False,
) -> None:
    """Write the frontier of a sweep: reward against KL, unless the sweep names other metrics."""
    format = output.suffix.removeprefix(".")
    if format not in ("svg", "csv"):
        raise typer.BadParameter("must end in .svg or .csv", param_hint="--output")
    with Client().stream("GET", f"{_path(sweep_id)}/frontier?format={format}") as response:
        output.write_bytes(b"".join(response.iter_bytes()))
    emit({"sweep": sweep_id, "file": str(output)}, as_json, str(output))


@sweeps.command("cancel")
def sweeps_cancel(sweep_id: str, as_json: Json = False) -> None:
    """Cancel all jobs of a sweep that have not ended."""
    sweep = Client().request("POST", f"{_path(sweep_id)}/cancel")
    emit(sweep, as_json, f"{sweep['id']}: {sweep['status']}")
