"""`dpo workers` and `dpo read-only`: what an operator stops for a while."""

from typing import Annotated

import typer

from app.cli.local import local
from app.cli.output import Json, emit, emit_table
from app.operations.schemas import OperationsChange

workers = typer.Typer(help="Workers of this installation (on the service's machine).", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="As 'dpo workers list' shows it.")]


@workers.command("list")
def workers_list(as_json: Json = False) -> None:
    """The workers that have reported in the last 90 seconds."""
    rows = [worker.model_dump() for worker in local().workers.list()]
    emit_table(rows, ["id", "lane", "cordoned", "serves", "last_seen_at"], as_json)


@workers.command("cordon")
def workers_cordon(name: Name, as_json: Json = False) -> None:
    """Let a worker finish its job and start no more, so that its host can be taken away."""
    worker = local().workers.cordon(name, True)
    emit(worker.model_dump(), as_json, f"{worker.id}: starts no more jobs")


@workers.command("uncordon")
def workers_uncordon(name: Name, as_json: Json = False) -> None:
    """Let a worker start jobs again."""
    worker = local().workers.cordon(name, False)
    emit(worker.model_dump(), as_json, f"{worker.id}: starts jobs")


@workers.command("pause")
def workers_pause(as_json: Json = False) -> None:
    """Let no worker start a job. Those that run go on."""
    state = local().operations.change(OperationsChange(claims_paused=True))
    emit(state.model_dump(), as_json, "workers start no jobs")


@workers.command("resume")
def workers_resume(as_json: Json = False) -> None:
    """Let workers start jobs again."""
    state = local().operations.change(OperationsChange(claims_paused=False))
    emit(state.model_dump(), as_json, "workers start jobs")


def read_only(
    reason: Annotated[str | None, typer.Argument(help="Why, for those whose requests are refused.")] = None,
    off: Annotated[bool, typer.Option("--off", help="Allow changes again.")] = False,
    as_json: Json = False,
) -> None:
    """Let nothing be changed, as during a copy of the database and the objects (on the service's machine).

    The API answers 503 to every write. Workers start no jobs, send no webhooks and delete nothing. Running jobs go on.
    """
    if off == (reason is not None):
        raise typer.BadParameter("give a reason, or --off")
    state = local().operations.change(OperationsChange(read_only=reason))
    emit(state.model_dump(), as_json, "changes are allowed" if off else f"nothing can be changed: {reason}")
