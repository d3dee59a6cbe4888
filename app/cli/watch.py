"""A progress bar and live metrics until a job or an evaluation ends."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from app.cli.client import Client
from app.cli.output import plain
from app.spec.json_types import JsonObject
from app.spec.metrics import SUMMARY

EXIT_STATUS = {"succeeded": 0, "failed": 1, "cancelled": 3}
GATE_NOT_MET = 4
JOB_POLL_SECONDS = 1.0


def watch(client: Client, path: str, console: Console) -> JsonObject:
    """Follow the job or evaluation at `path` until it ends; returns it."""
    columns = (
        TextColumn("{task.fields[state]:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
    )
    last_event: str | None = None
    client.waits = True
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("job", total=None, state="", metrics="")
        while True:
            job = client.request("GET", path)
            last_event = _print_new_events(client, path, last_event, console)
            _show(progress, task, job)
            if job["status"] in EXIT_STATUS and not _waits_for_evaluations(job):
                return job
            time.sleep(JOB_POLL_SECONDS)


def _waits_for_evaluations(job: JsonObject) -> bool:
    """Whether a training has succeeded but some of its gates still wait for evaluations of its model."""
    return job["status"] == "succeeded" and any(gate["met"] is None for gate in job["gates"])


def exit_status(job: JsonObject) -> int:
    """0 succeeded and all gates met, 1 failed, 3 cancelled, 4 a gate not met."""
    missed = job["status"] == "succeeded" and not all(gate["met"] for gate in job["gates"])
    return GATE_NOT_MET if missed else EXIT_STATUS[job["status"]]


def _show(progress: Progress, task: TaskID, job: JsonObject) -> None:
    state = job["status"]
    if job["paused"]:
        state += ", paused"
    elif state == "running" and job.get("stage"):
        state = f"running {job['stage']}"
    elif _waits_for_evaluations(job):
        state = "evaluated"
    elif state == "queued" and job["queue_position"]:
        state = f"queued, place {job['queue_position']}"
    if job["waiting_for"]:
        state += f", waits for {job['waiting_for']}"
    steps = job["progress"] or {}
    activity = steps.get("activity")
    if activity:
        state += f", {activity['name']}"
    metrics = job["metrics"] or {}
    text = "  ".join(f"{name} {metrics[name]:.3f}" for name in SUMMARY if name in metrics)
    completed, total = ("completions", "total") if "completions" in steps else ("step", "total_steps")
    if steps.get("questions"):
        completed, total = "answers", "questions"
    if activity and activity["done"] is not None:
        steps, completed, total = activity, "done", "total"
    progress.update(task, completed=steps.get(completed, 0), state=state, metrics=text)
    progress.tasks[task].total = steps.get(total) or None  # `update` would keep an earlier total in place of None


def _print_new_events(client: Client, path: str, last_event: str | None, console: Console) -> str | None:
    """Print the messages (not the metrics) after the event `last_event`; returns the id of the newest event."""
    new = []
    for event in client.pages(f"{path}/events", limit=200):
        if event["id"] == last_event:
            break
        new.append(event)
    for event in reversed(new):
        if event["type"] == "message":
            style = {"warn": "yellow", "error": "red"}.get(event["level"], "")
            console.print(plain(event["message"]), style=style, highlight=False, markup=False, soft_wrap=True)
    return new[0]["id"] if new else last_event
