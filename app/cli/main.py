"""The `dpo` command: run the service, and talk to one over HTTP.

Exit status: 0 done; 1 failed; 2 usage; 3 cancelled and 4 a quality gate not met (`dpo jobs watch`).
"""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import orjson
import typer
from pydantic import ValidationError
from rich.console import Console

from app.cli.client import Client, ClientError
from app.cli.compare import compare
from app.cli.describe import describe_estimate, describe_gate, describe_report
from app.cli.evaluations import evaluate, evaluations
from app.cli.output import Json, Limit, Output, console, emit, emit_table, read_body, read_gates, upload_files
from app.cli.processes import end_with_parent, supervise
from app.cli.sweeps import sweeps
from app.cli.tokens import count_tokens
from app.cli.watch import exit_status, watch
from app.datasets.check import survey
from app.datasets.mapping import Mapping
from app.datasets.rendering import RenderingSettings
from app.errors import ServiceError
from app.keys.schemas import KeySpec, Scope
from app.projects.schemas import Limits, ProjectSpec
from app.settings import Settings

if TYPE_CHECKING:
    from app.services import Services

cli = typer.Typer(name="dpo", help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
keys = typer.Typer(help="API keys of this installation (on the service's machine).", no_args_is_help=True)
projects = typer.Typer(help="Projects of this installation (on the service's machine).", no_args_is_help=True)
files = typer.Typer(help="Datasets.", no_args_is_help=True)
jobs = typer.Typer(help="Fine-tuning jobs.", no_args_is_help=True)
models = typer.Typer(help="Base models, and models made here.", no_args_is_help=True)
GROUPS = {
    "keys": keys, "projects": projects, "files": files, "jobs": jobs, "models": models, "evaluations": evaluations,
    "sweeps": sweeps,
}  # fmt: skip
for name, group in GROUPS.items():
    cli.add_typer(group, name=name)
cli.command()(evaluate)
cli.command()(compare)


def main() -> None:
    """Entry point: what the server or the settings refuse is one sentence and exit status 2."""
    end_with_parent()
    try:
        cli()
    except (ClientError, ServiceError) as error:
        message = str(error)
    except ValidationError as error:  # a variable of the environment, or an option that is not what it should be
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        variable = "DPO_" + name.removeprefix("DPO_").upper()
        message = f"{variable if error.title == 'Settings' else name}: {first['msg']}"
    else:
        return
    Console(stderr=True).print(f"dpo: {message}", style="red", highlight=False, markup=False)
    sys.exit(2)


# -- run the service ------------------------------------------------------------------------------------------


@cli.command()
def serve() -> None:
    """The API and one worker (GPU lane and CPU lane) in the foreground; Ctrl-C drains them."""
    settings = Settings()
    _migrate(settings)
    key = settings.home / "admin.key"
    source = "DPO_ADMIN_KEY" if settings.admin_key_value.get_secret_value() else str(key)
    settings.models_dir.mkdir(parents=True, exist_ok=True)
    _ = settings.admin_key, settings.secret_key  # made before the processes that share them start
    url = f"http://{settings.host}:{settings.port}"
    print(
        f"dpo-service on {url}/v1  (API reference: {url}/docs)\n"
        f"admin key:    {source}\n"
        f"base models:  {settings.models_dir}  (one subfolder each)\n"
        f"talk to it:   dpo models list;  dpo jobs create --help;  stop with Ctrl-C",
        flush=True,
    )
    parts = {
        "API": ["-m", "app.cli.main", "api"],
        "GPU lane": ["-m", "worker", "gpu"],
        "CPU lane": ["-m", "worker", "cpu"],
    }
    raise typer.Exit(supervise(parts))


@cli.command()
def api() -> None:
    """The HTTP API alone."""
    from app.main import create_app, serve

    settings = Settings()
    serve(create_app(settings), settings)


@cli.command()
def sweep(
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; without it they are only counted.")] = False,
    as_json: Json = False,
) -> None:
    """Find objects in the store that no row of the database needs (on the service's machine).

    They are what dead processes left half done, and of finished jobs what only a resume would have read. Look at the
    numbers before you delete: beside a wrong or an empty database no object is needed.
    """
    from app.sweep import sweep as look

    needed, spare = look(_local(), delete=delete)
    what = "removed" if delete else "not needed; 'dpo sweep --delete' removes them"
    emit(
        {"needed": needed, "not_needed": spare, "deleted": delete}, as_json, f"{needed} objects needed, {spare} {what}"
    )


@cli.command()
def worker(
    lane: Annotated[str | None, typer.Option(help="gpu (trains) or cpu (checks datasets); both if not given.")] = None,
) -> None:
    """Workers: one GPU-lane worker for each GPU, chosen by CUDA_VISIBLE_DEVICES."""
    if lane not in (None, "gpu", "cpu"):
        raise typer.BadParameter("must be gpu or cpu", param_hint="--lane")
    lanes = [lane] if lane else ["gpu", "cpu"]
    raise typer.Exit(supervise({f"{name} lane": ["-m", "worker", name] for name in lanes}))


@cli.command()
def migrate(
    revision: Annotated[str, typer.Argument(help="head, base, -1 or a revision.")] = "head",
) -> None:
    """Bring the database to this version's schema."""
    _migrate(Settings(), revision)
    console.print("The database is up to date." if revision == "head" else f"The database is at {revision}.")


def _migrate(settings: Settings, revision: str = "head") -> None:
    from app.services import Services

    Services.of(settings).migrate(revision)


def _local() -> "Services":
    """This machine's installation, its database brought to this version's schema."""
    from app.services import Services

    services = Services.of(Settings())
    services.migrate()
    return services


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Option(help="What the key is for.")],
    project: Annotated[str, typer.Option(help="Whose data it reaches.")] = "default",
    scope: Annotated[list[Scope] | None, typer.Option(help="read, write (the default) or admin.")] = None,
    expires_in_days: Annotated[float | None, typer.Option(min=0, help="No end if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Make an API key and print it. It is not stored and cannot be shown again."""
    seconds = None if expires_in_days is None else max(1, round(expires_in_days * 86400))
    scopes = scope or [Scope.READ, Scope.WRITE]
    key = _local().keys.create(KeySpec(name=name, project=project, scopes=scopes, expires_in=seconds))
    emit(key.model_dump(), as_json, key.key)


@keys.command("list")
def keys_list(
    project: Annotated[str | None, typer.Option(help="Only those of this project.")] = None, as_json: Json = False
) -> None:
    """All keys, oldest first; not what they are, which nobody knows."""
    rows = [key.model_dump(mode="json") for key in _local().keys.list(project)]
    emit_table(rows, ["id", "name", "project", "scopes", "expires_at", "last_used_at", "revoked_at"], as_json)


@keys.command("revoke")
def keys_revoke(key_id: str, as_json: Json = False) -> None:
    """Refuse a key from now on."""
    key = _local().keys.revoke(key_id)
    emit(key.model_dump(mode="json"), as_json, f"{key.id} ({key.name}): revoked")


@projects.command("create")
def projects_create(
    project: Annotated[str, typer.Argument(help="Lower-case letters, digits and dashes.")],
    max_storage_bytes: Annotated[int | None, typer.Option(min=0, help="No limit if not given.")] = None,
    max_running_jobs: Annotated[int | None, typer.Option(min=0, help="No limit if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Make a project. Keys of one see nothing of another."""
    spec = ProjectSpec(id=project, max_storage_bytes=max_storage_bytes, max_running_jobs=max_running_jobs)
    emit(_local().projects.create(spec).model_dump(), as_json, project)


@projects.command("list")
def projects_list(as_json: Json = False) -> None:
    """All projects, with what they use."""
    rows = [project.model_dump() for project in _local().projects.list()]
    emit_table(rows, ["id", "storage_bytes", "max_storage_bytes", "max_running_jobs"], as_json)


@projects.command("limit")
def projects_limit(
    project: str,
    max_storage_bytes: Annotated[int | None, typer.Option(min=-1, help="-1: no limit.")] = None,
    max_running_jobs: Annotated[int | None, typer.Option(min=-1, help="-1: no limit.")] = None,
    as_json: Json = False,
) -> None:
    """Change what a project may use; what is not given stays."""
    given = {"max_storage_bytes": max_storage_bytes, "max_running_jobs": max_running_jobs}
    limits = {name: None if value == -1 else value for name, value in given.items() if value is not None}
    found = _local().projects.limit(project, Limits(**limits))
    emit(found.model_dump(), as_json, f"{found.id}: limits changed")


@cli.command()
def train(
    spec: Annotated[Path, typer.Argument(help="The job body as JSON, with file paths in place of file ids.")],
    output: Annotated[Path, typer.Option(help="Folder for the result.")],
) -> None:
    """Run the engine alone, with no service."""
    # The worker package needs torch; the CLI and the API do not, and start it as a program.
    # It takes this process's place, so that Ctrl-C and the exit status are its own.
    os.execv(sys.executable, [sys.executable, "-m", "worker.standalone", str(spec), str(output)])  # noqa: S606


# -- talk to a service ----------------------------------------------------------------------------------------


def _mapping(value: str) -> Mapping | None:
    """A mapping from the command line: JSON, or the name of a file with it."""
    if not value:
        return None
    try:
        text = value if value.lstrip().startswith("{") else Path(value).read_text()
        return Mapping.model_validate_json(text)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--mapping") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise typer.BadParameter(f"{where}: {first['msg']}".lstrip(": "), param_hint="--mapping") from error


MappingOption = Annotated[
    str,
    typer.Option("--mapping", help='Which columns hold what: JSON such as \'{"prompt": "question", …}\', or a file.'),
]


TemplateOption = Annotated[
    bool | None,
    typer.Option(help="Always use the model's chat template, or never; by itself, but for prompts that it wrote."),
]
FoldOption = Annotated[
    bool | None, typer.Option("--fold-system", help="Write the system prompt into the first user turn.")
]


@files.command("check")
def files_check(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    mapping: MappingOption = "",
    model: Annotated[str, typer.Option(help="Count tokens too: a folder, or a model of DPO_MODELS_DIR.")] = "",
    max_length: Annotated[int, typer.Option(min=16, help="Tokens of a prompt and one answer, with --model.")] = 2048,
    chat_template: TemplateOption = None,
    fold_system: FoldOption = None,
    as_json: Json = False,
) -> None:
    """Check a dataset here, with no service. Exit status: 0 it can be trained on, 1 it cannot."""
    said = _mapping(mapping)
    with path.open("rb") as file:
        report = survey(file, said)
    found = report.as_json()
    if model and found["valid"]:
        folder = Path(model) if Path(model).is_dir() else Settings().models_dir / model
        rendering = RenderingSettings(chat_template=chat_template, fold_system=fold_system)
        found["tokens"] = count_tokens(path, folder, model, max_length, found, said, rendering)
    emit(found, as_json, describe_report(found, shlex.quote(str(path))))
    raise typer.Exit(0 if found["valid"] else 1)


@files.command("report")
def files_report(
    file_id: str,
    model: Annotated[str, typer.Option(help="Count tokens as this model does.")] = "",
    max_length: Annotated[int | None, typer.Option(min=16, help="Tokens of a prompt and one answer.")] = None,
    chat_template: TemplateOption = None,
    fold_system: FoldOption = None,
    as_json: Json = False,
) -> None:
    """What the service found in an uploaded file; waits until it is counted."""
    asked = {
        "model": model or None,
        "max_length": max_length,
        "chat_template": chat_template,
        "fold_system": fold_system,
    }
    params = {name: value for name, value in asked.items() if value is not None}
    found = Client().when_ready("GET", f"/files/{quote(file_id, safe='')}/report", params=params)
    emit(found, as_json, describe_report(found))


@files.command("upload")
def files_upload(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    mapping: MappingOption = "",
    expires_in: Annotated[
        int | None, typer.Option(min=3600, max=2592000, help="Seconds until it goes by itself.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Upload a dataset and print its id."""
    said = _mapping(mapping)
    form: dict[str, Any] = {} if said is None else {"mapping": said.model_dump_json(exclude_none=True)}
    if expires_in is not None:
        form |= {"expires_after[anchor]": "created_at", "expires_after[seconds]": str(expires_in)}
    file = Client().upload(path, form)
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


def _set_hyperparameters(body: dict[str, Any], **given: float | str | None) -> None:
    """Write those that are given into the method of a job's body."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if not chosen:
        return
    method = body.get("method")
    kind = method.get("type") if isinstance(method, dict) else None
    for name in ("beta", "loss"):
        if name in chosen and kind != "dpo":
            raise typer.BadParameter("goes with the method dpo", param_hint=f"--{name}")
    if not isinstance(method, dict) or not isinstance(kind, str):
        raise typer.BadParameter("--spec has no method to set them in", param_hint="hyperparameters")
    own = method.get(kind) or {}
    set_already = own.get("hyperparameters") or {} if isinstance(own, dict) else None
    if not isinstance(set_already, dict):
        raise typer.BadParameter(f"method.{kind} of --spec is not what docs/jobs.md says", param_hint="hyperparameters")
    method[kind] = own | {"hyperparameters": set_already | chosen}


@jobs.command("create")
def jobs_create(
    model: Annotated[str, typer.Option(help="Base model, made model or checkpoint.")] = "",
    training_file: Annotated[str, typer.Option(help="File id, or a path to upload first.")] = "",
    validation_file: Annotated[str, typer.Option(help="File id or path.")] = "",
    method: Annotated[str, typer.Option(help="dpo (without --spec, the default) or supervised.")] = "",
    sft: Annotated[bool, typer.Option("--sft", help="Run a supervised stage first.")] = False,
    beta: Annotated[float | None, typer.Option(help="β of DPO.")] = None,
    loss: Annotated[str, typer.Option(help="sigmoid (the default), ipo, simpo, kto, …: see docs/jobs.md.")] = "",
    epochs: Annotated[int | None, typer.Option(help="Passes over the method's data.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the method's stage.")] = None,
    suffix: Annotated[str, typer.Option(help="Part of the new model's name.")] = "",
    spec: Annotated[Path | None, typer.Option(help="A JSON file with the whole job body; '-' for stdin.")] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(help="What must hold at the end: 'eval/rewards/accuracies>=0.6'; several."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--estimate", help="Say what it would take, and start nothing.")] = False,
    follow: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    as_json: Json = False,
) -> None:
    """Start a job. Options add to or override the body of --spec.

    With --watch, the exit status is that of `dpo jobs watch`. With --estimate: 0 it would be accepted, 1 refused.
    """
    client = Client()
    body = read_body(spec)
    if method or spec is None:
        body["method"] = {"type": method or "dpo"}
    _set_hyperparameters(body, beta=beta, loss=loss or None, n_epochs=epochs, learning_rate=learning_rate)
    if sft:
        body.setdefault("sft", {})
    given = {"model": model, "training_file": training_file, "validation_file": validation_file, "suffix": suffix}
    body |= {key: value for key, value in given.items() if value}
    if gate:
        body["gates"] = [*body.get("gates", []), *read_gates(gate)]
    upload_files(client, body)
    if dry_run:
        found = client.when_ready("POST", "/fine_tuning/estimate", json=body)
        emit(found, as_json, describe_estimate(found))
        raise typer.Exit(0 if found["ok"] else 1)
    job = client.request("POST", "/fine_tuning/jobs", json=body)
    if follow:
        _follow(client, job["id"], as_json)
    emit(job, as_json, job["id"])


@jobs.command("list")
def jobs_list(limit: Limit = 20, as_json: Json = False) -> None:
    """Jobs, newest first."""
    rows = list(Client().pages("/fine_tuning/jobs", limit))
    emit_table(rows, ["id", "status", "stage", "model", "fine_tuned_model"], as_json)


@jobs.command("show")
def jobs_show(job_id: str, as_json: Json = False) -> None:
    """One job."""
    job = Client().request("GET", f"/fine_tuning/jobs/{quote(job_id, safe='')}")
    text = "\n".join(f"{key}: {value}" for key, value in job.items() if value not in (None, [], {}))
    emit(job, as_json, text)


@jobs.command("watch")
def jobs_watch(job_id: str, as_json: Json = False) -> None:
    """Follow a job to its end. Exit status: 0 succeeded, 1 failed, 3 cancelled, 4 a quality gate not met."""
    _follow(Client(), job_id, as_json)


def _follow(client: Client, job_id: str, as_json: bool) -> None:
    job = watch(client, f"/fine_tuning/jobs/{quote(job_id, safe='')}", Console(stderr=as_json))
    text = f"{job['id']}: {job['status']}"
    if job["error"]:
        text += f"\n{job['error']['message']}"
    for verdict in job["gates"]:
        text += f"\n{describe_gate(verdict)}"
    if job["status"] == "succeeded":
        text += _next_steps(job)
    emit(job, as_json, text)
    raise typer.Exit(exit_status(job))


def _next_steps(job: dict[str, Any]) -> str:
    name = job["fine_tuned_model"]
    base = job["model"] if not job["model"].startswith("ft:") else name.split(":")[1]
    loss = ((job["method"].get("dpo") or {}).get("hyperparameters") or {}).get("loss")
    package, loader, serve = (
        "peft",
        "AutoPeftModelForCausalLM",
        f"vllm serve {base} --enable-lora --lora-modules tuned=model",
    )
    if loss == "reward_model":
        package, loader, serve = (
            "transformers",
            "AutoModelForSequenceClassification",
            "vllm serve ./model --task classify",
        )
    elif job["adapter"] == "none":
        package, loader, serve = "transformers", "AutoModelForCausalLM", "vllm serve ./model"
    elif job["adapter"]["use_dora"]:
        serve = "merge it first: vLLM takes no DoRA adapters"
    return f"""
model: {name}

download it:        dpo models download '{name}' --output model
load it in Python:  from {package} import {loader}
                    {loader}.from_pretrained("model")
serve it:           {serve}"""


@jobs.command("logs")
def jobs_logs(job_id: str, as_json: Json = False) -> None:
    """The trainer's log of the latest attempt."""
    with Client().stream("GET", f"/fine_tuning/jobs/{quote(job_id, safe='')}/logs") as response:
        if as_json:
            print(orjson.dumps({"job": job_id, "log": response.read().decode("utf-8", "replace")}).decode())
            return
        for chunk in response.iter_bytes():
            sys.stdout.buffer.write(chunk)


@jobs.command("cancel")
def jobs_cancel(job_id: str, as_json: Json = False) -> None:
    """Cancel a job. Its checkpoints stay."""
    job = Client().request("POST", f"/fine_tuning/jobs/{quote(job_id, safe='')}/cancel")
    emit(job, as_json, f"{job['id']}: {job['status']}")


@jobs.command("pause")
def jobs_pause(job_id: str, as_json: Json = False) -> None:
    """Hold a job back. A running one writes a checkpoint and frees its GPU."""
    job = Client().request("POST", f"/fine_tuning/jobs/{quote(job_id, safe='')}/pause")
    emit(job, as_json, f"{job['id']}: {job['status']}, paused")


@jobs.command("resume")
def jobs_resume(job_id: str, as_json: Json = False) -> None:
    """Let a paused job go on from where it was."""
    job = Client().request("POST", f"/fine_tuning/jobs/{quote(job_id, safe='')}/resume")
    emit(job, as_json, f"{job['id']}: {job['status']}")


@models.command("list")
def models_list(as_json: Json = False) -> None:
    """Base models that workers serve, and models made here."""
    emit_table(Client().request("GET", "/models")["data"], ["id", "kind", "base_model", "owned_by"], as_json)


@models.command("download")
def models_download(
    model: str,
    output: Output,
    merged: Annotated[bool, typer.Option("--merged", help="Whole weights, the adapter in them.")] = False,
    dtype: Annotated[str, typer.Option(help="Of merged weights: bf16 or fp16.")] = "bf16",
    as_json: Json = False,
) -> None:
    """Download a model made here, or a checkpoint, into a folder."""
    Client().download_model(model, output, {"format": "merged", "dtype": dtype} if merged else {})
    emit({"model": model, "folder": str(output)}, as_json, str(output))


@models.command("lineage")
def models_lineage(model: str, as_json: Json = False) -> None:
    """How a model came to be, from its base model on."""
    found = Client().request("GET", f"/models/{quote(model, safe=':')}/lineage")
    text = f"{found['base_model']} (revision {found['base_revision'] or 'unknown'})"
    for step in found["steps"]:
        method = ("SFT, then " if step["sft"] else "") + step["method"]
        text += f"\n  {method} on {', '.join(step['files'])} by {step['job']}\n{step['model']}"
    emit(found, as_json, text)


@models.command("delete")
def models_delete(model: str, as_json: Json = False) -> None:
    """Delete a model made here, unless something needs it."""
    emit(Client().request("DELETE", f"/models/{quote(model, safe=':')}"), as_json, f"{model}: deleted")


if __name__ == "__main__":
    main()
