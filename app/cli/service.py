"""Run the service or one of its parts on this machine, or the engine alone."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from app.cli.local import migrate_database
from app.cli.output import console
from app.cli.processes import WORKER_SECONDS, supervise
from app.private_files import keep_private
from app.programs import command
from app.settings import Settings


def serve() -> None:
    """The API and one worker (GPU lane and CPU lane) in the foreground; Ctrl-C drains them."""
    settings = Settings()
    keep_private(settings.home)
    migrate_database(settings)
    key = settings.home / "admin.key"
    source = "DPO_ADMIN_KEY" if settings.admin_key_value.get_secret_value() else str(key)
    settings.models_dir.mkdir(parents=True, exist_ok=True)
    _ = settings.admin_key, settings.secret_keys  # makes them before the processes that share them start
    url = f"http://{settings.host}:{settings.port}"
    print(
        f"dpo-service on {url}/v1  (API reference: {url}/docs)\n"
        f"admin key:    {source}\n"
        f"base models:  {settings.models_dir}  (one subfolder each)\n"
        f"talk to it:   dpo models list;  dpo jobs create --help;  stop with Ctrl-C",
        flush=True,
    )
    parts = {
        "API": command("app.cli.main", "api"),
        "GPU lane": command("worker", "gpu"),
        "CPU lane": command("worker", "cpu"),
    }
    raise typer.Exit(supervise(parts, WORKER_SECONDS + settings.shutdown_seconds))


def api() -> None:
    """The HTTP API alone."""
    from app.main import create_app, serve

    settings = Settings()
    keep_private(settings.home)
    serve(create_app(settings), settings)


def worker(
    lane: Annotated[str | None, typer.Option(help="gpu (trains) or cpu (checks datasets); both if not given.")] = None,
) -> None:
    """Workers: the GPU lane uses all GPUs that CUDA_VISIBLE_DEVICES shows."""
    if lane not in (None, "gpu", "cpu"):
        raise typer.BadParameter("must be gpu or cpu", param_hint="--lane")
    lanes = [lane] if lane else ["gpu", "cpu"]
    raise typer.Exit(supervise({f"{name} lane": command("worker", name) for name in lanes}))


def migrate(
    revision: Annotated[str, typer.Argument(help="head, base, -1 or a revision.")] = "head",
) -> None:
    """Migrate the database to this version's schema."""
    migrate_database(Settings(), revision)
    console.print("The database is up to date." if revision == "head" else f"The database is at {revision}.")


def train(
    spec: Annotated[Path, typer.Argument(help="The job body as JSON, with file paths in place of file ids.")],
    output: Annotated[Path, typer.Option(help="Folder for the result.")],
) -> None:
    """Run the engine alone, without a service."""
    # The worker package needs torch. The CLI and the API do not import it, but start it as a program.
    # It replaces this process, so that Ctrl-C and the exit status are its own.
    os.execv(sys.executable, command("worker.standalone", str(spec), str(output)))  # noqa: S606
