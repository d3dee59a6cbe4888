"""`dpo projects`: the projects of this installation, what they may use and what they have used."""

from typing import Annotated

import typer

from app.cli.local import local
from app.cli.output import Json, emit, emit_table
from app.projects.schemas import Limits, ProjectSpec

projects = typer.Typer(help="Projects of this installation (on the service's machine).", no_args_is_help=True)
Limit = Annotated[int | None, typer.Option(min=-1, help="-1: no limit.")]
Priority = Annotated[int | None, typer.Option(min=-100, max=100, help="The highest that a job may ask for.")]
Weight = Annotated[float | None, typer.Option(min=0.01, max=100, help="Its share of the GPUs, beside those of others.")]


def _limits(**options: float | None) -> dict[str, float | None]:
    """The limits that the command names. For a number of things, -1 means no limit."""
    given = {name: value for name, value in options.items() if value is not None}
    return {name: None if value == -1 and name != "max_priority" else value for name, value in given.items()}


@projects.command("create")
def projects_create(
    project: Annotated[str, typer.Argument(help="Lower-case letters, digits and dashes.")],
    max_storage_bytes: Limit = None,
    max_running_jobs: Limit = None,
    max_queued_jobs: Limit = None,
    max_priority: Priority = None,
    weight: Weight = None,
    as_json: Json = False,
) -> None:
    """Make a project. The keys of one project see nothing of another."""
    limits = _limits(
        max_storage_bytes=max_storage_bytes,
        max_running_jobs=max_running_jobs,
        max_queued_jobs=max_queued_jobs,
        max_priority=max_priority,
        weight=weight,
    )
    spec = ProjectSpec.model_validate({"id": project} | limits)
    emit(local().projects.create(spec).model_dump(), as_json, project)


@projects.command("list")
def projects_list(as_json: Json = False) -> None:
    """All projects, with their limits and what they store."""
    rows = [project.model_dump() for project in local().projects.list()]
    emit_table(rows, ["id", "storage_bytes", *Limits.model_fields], as_json)


@projects.command("limit")
def projects_limit(
    project: str,
    max_storage_bytes: Limit = None,
    max_running_jobs: Limit = None,
    max_queued_jobs: Limit = None,
    max_priority: Priority = None,
    weight: Weight = None,
    as_json: Json = False,
) -> None:
    """Change the limits of a project. A limit that is not given stays."""
    limits = _limits(
        max_storage_bytes=max_storage_bytes,
        max_running_jobs=max_running_jobs,
        max_queued_jobs=max_queued_jobs,
        max_priority=max_priority,
        weight=weight,
    )
    changed = local().projects.limit(project, Limits.model_validate(limits))
    emit(changed.model_dump(), as_json, f"{changed.id}: limits changed")


@projects.command("usage")
def projects_usage(
    project: Annotated[str | None, typer.Argument(help="A project; all if not given.")] = None,
    first_month: Annotated[str | None, typer.Option(help="Such as 2026-01.")] = None,
    last_month: Annotated[str | None, typer.Option(help="Such as 2026-12.")] = None,
    as_json: Json = False,
) -> None:
    """The usage of projects, by month."""
    rows = [usage.model_dump() for usage in local().usage.list(project, first_month, last_month)]
    columns = ["project", "month", "gpu_seconds", "trained_tokens", "storage_bytes", "storage_byte_hours"]
    emit_table(rows, columns, as_json)
