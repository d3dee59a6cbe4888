"""The `dpo` command: run the service, and talk to one over HTTP.

Exit status: 0 done; 1 failed; 2 usage; 3 cancelled and 4 a quality gate not met (`dpo jobs watch`).
"""

import sys

import typer
from pydantic import ValidationError
from rich.console import Console

from app.cli import service
from app.cli.client import ClientError
from app.cli.compare import compare
from app.cli.evaluations import evaluate, evaluations
from app.cli.files import files
from app.cli.fsck import fsck
from app.cli.jobs import jobs
from app.cli.keys import keys
from app.cli.labellings import label, labellings
from app.cli.models import models
from app.cli.operations import read_only, workers
from app.cli.output import plain
from app.cli.pipelines import pipelines
from app.cli.processes import end_with_parent
from app.cli.projects import projects
from app.cli.secrets import secrets
from app.cli.storage import storage
from app.cli.sweeps import sweeps
from app.errors import ServiceError

cli = typer.Typer(name="dpo", help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
VERBS = (
    service.serve, service.api, service.worker, service.migrate, service.train, evaluate, label, compare, read_only,
    fsck,
)  # fmt: skip
for verb in VERBS:
    cli.command()(verb)
GROUPS = {
    "keys": keys, "projects": projects, "storage": storage, "files": files, "jobs": jobs, "models": models,
    "evaluations": evaluations, "labellings": labellings,
    "pipelines": pipelines, "sweeps": sweeps, "secrets": secrets, "workers": workers,
}  # fmt: skip
for name, group in GROUPS.items():
    cli.add_typer(group, name=name)


def main() -> None:
    """Entry point. An error of the server or the settings becomes one sentence and exit status 2."""
    end_with_parent()
    try:
        cli()
    except (ClientError, ServiceError) as error:
        message = str(error)
    except ValidationError as error:  # an environment variable or an option is not valid
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        variable = "DPO_" + name.removeprefix("DPO_").upper()
        message = f"{variable if error.title == 'Settings' else name}: {first['msg']}"
    else:
        return
    Console(stderr=True).print(plain(f"dpo: {message}"), style="red", highlight=False, markup=False)
    sys.exit(2)


if __name__ == "__main__":
    main()
