"""`dpo jobs`: fine-tuning jobs of a service."""

import shlex
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console

from app.cli.client import Client
from app.cli.describe import describe_estimate, describe_gate
from app.cli.output import Json, Limit, as_json_text, emit, emit_table, plain, read_body, read_gates
from app.cli.uploads import IdempotencyKey, Uploads, upload_files
from app.cli.watch import exit_status, watch
from app.spec.json_types import JsonObject

jobs = typer.Typer(help="Fine-tuning jobs.", no_args_is_help=True)


def _set_hyperparameters(body: JsonObject, **options: float | str | None) -> None:
    """Write the options that are not None into the method of a job's body."""
    new = {name: value for name, value in options.items() if value is not None}
    if not new:
        return
    method = body.get("method")
    kind = method.get("type") if isinstance(method, dict) else None
    for name in ("beta", "loss"):
        if name in new and not (kind == "dpo" or (kind == "reinforcement" and name == "beta")):
            raise typer.BadParameter("does not go with this method", param_hint=f"--{name}")
    if not isinstance(method, dict) or not isinstance(kind, str):
        raise typer.BadParameter("--spec has no method to set them in", param_hint="hyperparameters")
    settings = method.get(kind) or {}
    old = settings.get("hyperparameters") or {} if isinstance(settings, dict) else None
    if not isinstance(old, dict):
        raise typer.BadParameter(f"method.{kind} of --spec does not match docs/jobs.md", param_hint="hyperparameters")
    method[kind] = settings | {"hyperparameters": old | new}


@jobs.command("create")
def jobs_create(
    model: Annotated[str, typer.Option(help="A base model, a trained model or a checkpoint.")] = "",
    training_file: Annotated[str, typer.Option(help="File id, or a path to upload first.")] = "",
    validation_file: Annotated[str, typer.Option(help="File id or path.")] = "",
    method: Annotated[
        str, typer.Option(help="dpo (the default without --spec) or supervised; reinforcement needs --spec.")
    ] = "",
    sft: Annotated[bool, typer.Option("--sft", help="Run a supervised stage first.")] = False,
    beta: Annotated[float | None, typer.Option(help="β of DPO.")] = None,
    loss: Annotated[str, typer.Option(help="sigmoid (the default), ipo, simpo, kto, …: see docs/jobs.md.")] = "",
    epochs: Annotated[int | None, typer.Option(help="Passes over the method's data.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The learning rate of the method's stage.")] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Devices to train on. The adapter's bytes are the same.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="The most machines that these devices may be on.")] = None,
    suffix: Annotated[str, typer.Option(help="Part of the new model's name.")] = "",
    spec: Annotated[
        Path | None, typer.Option(help="The job body as a JSON file; it may name files by path. '-' for stdin.")
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(help="A condition at the end, e.g. 'eval/rewards/accuracies>=0.6'. Repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--estimate", help="Print what the job would take; start nothing.")] = False,
    idempotency_key: IdempotencyKey = "",
    follow: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    as_json: Json = False,
) -> None:
    """Start a job. Options add to or override the body of --spec.

    A file that the service has already is not uploaded again. A job that is refused leaves no file behind.

    With --watch, the exit status is that of `dpo jobs watch`. With --estimate: 0 accepted, 1 refused.
    """
    client = Client()
    body = read_body(spec)
    if method or spec is None:
        body["method"] = {"type": method or "dpo"}
    _set_hyperparameters(body, beta=beta, loss=loss or None, n_epochs=epochs, learning_rate=learning_rate)
    if sft:
        body.setdefault("sft", {})
    fields = {"model": model, "training_file": training_file, "validation_file": validation_file, "suffix": suffix}
    body |= {key: value for key, value in fields.items() if value}
    resources = {"gpus": gpus, "nodes": nodes}
    if stated := {name: count for name, count in resources.items() if count is not None}:
        given = body.get("resources")
        body["resources"] = (given if isinstance(given, dict) else {}) | stated
    if gate:
        body["gates"] = [*body.get("gates", []), *read_gates(gate)]
    with Uploads(client, idempotency_key) as uploads:
        upload_files(uploads.add, body)
        if dry_run:
            estimate = client.when_ready("POST", "/fine_tuning/estimate", json=body)
            if not estimate["ok"]:
                uploads.discard()
            emit(estimate, as_json, describe_estimate(estimate))
            raise typer.Exit(0 if estimate["ok"] else 1)
        job = client.request("POST", "/fine_tuning/jobs", json=body, headers=uploads.headers)
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
    for gate in job["gates"]:
        text += f"\n{describe_gate(gate)}"
    if job["status"] == "succeeded":
        text += next_steps(job)
    emit(job, as_json, text)
    raise typer.Exit(exit_status(job))


VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `--max-lora-rank`, its default first (vLLM 0.33, `LoRAConfig`)."""


def next_steps(job: JsonObject) -> str:
    """How to download, load and serve the job's model."""
    name, adapter = job["fine_tuned_model"], job["adapter"]
    base = job["model"] if not job["model"].startswith("ft:") else name.split(":")[1]
    loss = ((job["method"].get("dpo") or {}).get("hyperparameters") or {}).get("loss")
    package, loader, serve = (
        "peft",
        "AutoPeftModelForCausalLM",
        f"vllm serve {shlex.quote(base)} --enable-lora --lora-modules tuned=model",
    )
    if loss == "reward_model":
        package, loader, serve = (
            "transformers",
            "AutoModelForSequenceClassification",
            "vllm serve ./model --runner pooling --convert classify",
        )
    elif adapter == "none":
        package, loader, serve = "transformers", "AutoModelForCausalLM", "vllm serve ./model"
    elif adapter["use_dora"] or adapter.get("modules_to_save"):
        serve = "merge it first: vLLM takes no adapters with DoRA or 'modules_to_save'"
    elif adapter["r"] > VLLM_RANKS[-1]:
        serve = f"merge it first: vLLM takes adapters up to rank {VLLM_RANKS[-1]}"
    elif adapter["r"] > VLLM_RANKS[0]:
        serve += f" --max-lora-rank {next(rank for rank in VLLM_RANKS if rank >= adapter['r'])}"
    needs = f"\nboth need:          the base model '{base}', from the hub or as a folder of this name here"
    return f"""
model: {name}

download it:        dpo models download {shlex.quote(name)} --output model
load it in Python:  from {package} import {loader}
                    {loader}.from_pretrained("model")
serve it:           {serve}{needs if package == "peft" else ""}"""


@jobs.command("logs")
def jobs_logs(job_id: str, as_json: Json = False) -> None:
    """The trainer's log of the latest attempt."""
    with Client().stream("GET", f"/fine_tuning/jobs/{quote(job_id, safe='')}/logs") as response:
        if as_json:
            print(as_json_text({"job": job_id, "log": response.read().decode("utf-8", "replace")}, indent=False))
            return
        for line in response.iter_lines():  # users choose some of its texts
            print(plain(line))


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
    """Let a paused job continue where it stopped."""
    job = Client().request("POST", f"/fine_tuning/jobs/{quote(job_id, safe='')}/resume")
    emit(job, as_json, f"{job['id']}: {job['status']}")
