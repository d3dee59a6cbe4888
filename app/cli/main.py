"""The `dpo` command: run the service, and talk to one over HTTP.

Exit status: 0 done; 1 failed; 2 usage; 3 cancelled (`dpo jobs watch`).
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import orjson
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from app.cli.client import Client, ClientError
from app.cli.processes import end_with_parent, supervise
from app.cli.watch import EXIT_STATUS, watch
from app.settings import Settings

cli = typer.Typer(name="dpo", help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
keys = typer.Typer(help="API keys of this installation (on the service's machine).", no_args_is_help=True)
files = typer.Typer(help="Datasets.", no_args_is_help=True)
jobs = typer.Typer(help="Fine-tuning jobs.", no_args_is_help=True)
models = typer.Typer(help="Base models, and models made here.", no_args_is_help=True)
for name, group in (("keys", keys), ("files", files), ("jobs", jobs), ("models", models)):
    cli.add_typer(group, name=name)

console = Console()
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Limit = Annotated[int, typer.Option(min=1, help="At most this many.")]


def main() -> None:
    """Entry point: what the server or the settings refuse is one sentence and exit status 2."""
    end_with_parent()
    try:
        cli()
    except ClientError as error:
        message = str(error)
    except ValidationError as error:  # a variable of the environment
        first = error.errors()[0]
        message = f"{'DPO_' + str(first['loc'][0]).removeprefix('DPO_').upper()}: {first['msg']}"
    else:
        return
    Console(stderr=True).print(f"dpo: {message}", style="red", highlight=False, markup=False)
    sys.exit(2)


def _emit(value: Any, as_json: bool, text: str) -> None:
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() if as_json else text)


def _table(rows: list[dict[str, Any]], columns: list[str], as_json: bool) -> None:
    if as_json:
        print(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode())
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if row.get(column) is None else str(row[column]) for column in columns))
    console.print(table)


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
    import uvicorn

    from app.main import create_app

    settings = Settings()
    uvicorn.run(create_app(settings), host=settings.host, port=settings.port, log_level="warning", access_log=False)


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


@keys.command("create")
def keys_create(
    name: Annotated[str, typer.Option(help="What the key is for.")],
    project: Annotated[str, typer.Option(help="Whose data it reaches.")] = "default",
    expires_in_days: Annotated[float | None, typer.Option(min=0, help="No end if not given.")] = None,
) -> None:
    """Make an API key and print it. It is not stored and cannot be shown again."""
    from app.services import Services

    services = Services.of(Settings())
    services.migrate()
    print(services.keys.create(name, project, expires_in_days))


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


@files.command("upload")
def files_upload(path: Annotated[Path, typer.Argument(exists=True, dir_okay=False)], as_json: Json = False) -> None:
    """Upload a dataset and print its id."""
    file = Client().upload(path)
    _emit(file, as_json, file["id"])


@files.command("list")
def files_list(limit: Limit = 100, as_json: Json = False) -> None:
    """The files of this key's project, newest first."""
    rows = list(Client().pages("/files", limit))
    _table(rows, ["id", "filename", "purpose", "bytes"], as_json)


@jobs.command("create")
def jobs_create(
    model: Annotated[str, typer.Option(help="Base model, made model or checkpoint.")] = "",
    training_file: Annotated[str, typer.Option(help="File id, or a path to upload first.")] = "",
    validation_file: Annotated[str, typer.Option(help="File id or path.")] = "",
    method: Annotated[str, typer.Option(help="dpo (without --spec, the default) or supervised.")] = "",
    sft: Annotated[bool, typer.Option("--sft", help="Run a supervised stage first.")] = False,
    beta: Annotated[float | None, typer.Option(help="β of DPO.")] = None,
    loss: Annotated[str, typer.Option(help="sigmoid (the default), ipo, simpo, kto, …: see docs/jobs.md.")] = "",
    suffix: Annotated[str, typer.Option(help="Part of the new model's name.")] = "",
    spec: Annotated[Path | None, typer.Option(help="A JSON file with the whole job body; '-' for stdin.")] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    as_json: Json = False,
) -> None:
    """Start a job. Options add to or override the body of --spec."""
    client = Client()
    body: dict[str, Any] = {}
    if spec is not None:
        try:
            body = orjson.loads(sys.stdin.buffer.read() if str(spec) == "-" else spec.read_bytes())
        except (OSError, orjson.JSONDecodeError) as error:
            raise typer.BadParameter(str(error), param_hint="--spec") from error
        if not isinstance(body, dict):
            raise typer.BadParameter("must hold a JSON object", param_hint="--spec")
    if method or spec is None:
        body["method"] = {"type": method or "dpo"}
    for name, value in (("beta", beta), ("loss", loss or None)):
        if value is not None:
            if not isinstance(body.get("method"), dict) or body["method"].get("type") != "dpo":
                raise typer.BadParameter("goes with the method dpo", param_hint=f"--{name}")
            body["method"].setdefault("dpo", {}).setdefault("hyperparameters", {})[name] = value
    if sft:
        body.setdefault("sft", {})
    given = {"model": model, "training_file": training_file, "validation_file": validation_file, "suffix": suffix}
    body |= {key: value for key, value in given.items() if value}
    for field in ("training_file", "validation_file"):
        if field in body and Path(body[field]).is_file():
            body[field] = client.upload(Path(body[field]))["id"]
    job = client.request("POST", "/fine_tuning/jobs", json=body)
    if follow:
        _follow(client, job["id"], as_json)
    _emit(job, as_json, job["id"])


@jobs.command("list")
def jobs_list(limit: Limit = 20, as_json: Json = False) -> None:
    """Jobs, newest first."""
    rows = list(Client().pages("/fine_tuning/jobs", limit))
    _table(rows, ["id", "status", "stage", "model", "fine_tuned_model"], as_json)


@jobs.command("show")
def jobs_show(job_id: str, as_json: Json = False) -> None:
    """One job."""
    job = Client().request("GET", f"/fine_tuning/jobs/{quote(job_id, safe='')}")
    text = "\n".join(f"{key}: {value}" for key, value in job.items() if value not in (None, [], {}))
    _emit(job, as_json, text)


@jobs.command("watch")
def jobs_watch(job_id: str, as_json: Json = False) -> None:
    """Follow a job to its end. Exit status: 0 succeeded, 1 failed, 3 cancelled."""
    _follow(Client(), job_id, as_json)


def _follow(client: Client, job_id: str, as_json: bool) -> None:
    job = watch(client, quote(job_id, safe=""), Console(stderr=as_json))
    text = f"{job['id']}: {job['status']}"
    if job["error"]:
        text += f"\n{job['error']['message']}"
    if job["status"] == "succeeded":
        text += _next_steps(job)
    _emit(job, as_json, text)
    raise typer.Exit(EXIT_STATUS[job["status"]])


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
    _emit(job, as_json, f"{job['id']}: {job['status']}")


@models.command("list")
def models_list(as_json: Json = False) -> None:
    """Base models that workers serve, and models made here."""
    _table(Client().request("GET", "/models")["data"], ["id", "kind", "base_model", "owned_by"], as_json)


@models.command("download")
def models_download(
    model: str,
    output: Annotated[Path, typer.Option(help="Folder to unpack into; it must be empty or new.")],
    as_json: Json = False,
) -> None:
    """Download a model made here, or a checkpoint, into a folder."""
    if output.exists() and any(output.iterdir()):
        raise typer.BadParameter(f"{output} is not empty", param_hint="--output")
    Client().download(model, output)
    _emit({"model": model, "folder": str(output)}, as_json, str(output))


if __name__ == "__main__":
    main()
