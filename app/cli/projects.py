"""`dpo projects`: the projects of this installation and what they may use."""

from typing import Annotated

import typer

from app.cli.local import local
from app.cli.output import Json, emit, emit_table
from app.projects.schemas import Limits, ProjectSpec

projects = typer.Typer(help="Projects of this installation (on the service's machine).", no_args_is_help=True)


@projects.command("create")
def projects_create(
    project: Annotated[str, typer.Argument(help="Lower-case letters, digits and dashes.")],
    max_storage_bytes: Annotated[int | None, typer.Option(min=0, help="No limit if not given.")] = None,
    max_running_jobs: Annotated[int | None, typer.Option(min=0, help="No limit if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Make a project. The keys of one project see nothing of another."""
    spec = ProjectSpec(id=project, max_storage_bytes=max_storage_bytes, max_running_jobs=max_running_jobs)
    emit(local().projects.create(spec).model_dump(), as_json, project)


@projects.command("list")
def projects_list(as_json: Json = False) -> None:
    """All projects, with what they use."""
    rows = [project.model_dump() for project in local().projects.list()]
    emit_table(rows, ["id", "storage_bytes", "max_storage_bytes", "max_running_jobs"], as_json)


@projects.command("limit")
def projects_limit(
    project: str,
    max_storage_bytes: Annotated[int | None, typer.Option(min=-1, help="-1: no limit.")] = None,
    max_running_jobs: Annotated[int | None, typer.Option(min=-1, help="-1: no limit.")] = None,
    as_json: Json = False,
) -> None:
    """Change the limits of a project. A limit that is not given stays."""
    options = {"max_storage_bytes": max_storage_bytes, "max_running_jobs": max_running_jobs}
    limits = {name: None if value == -1 else value for name, value in options.items() if value is not None}
    changed = local().projects.limit(project, Limits(**limits))
    emit(changed.model_dump(), as_json, f"{changed.id}: limits changed")
