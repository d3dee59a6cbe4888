"""`dpo evaluate` and `dpo evaluations`: measure whether a model is better."""

import os
from pathlib import Path
from typing import Annotated

import typer

from app.cli import result_files
from app.cli.client import Client
from app.cli.output import Json, emit, read_body, read_gates
from app.cli.result_files import group_of
from app.cli.uploads import IdempotencyKey, Uploads, upload_files
from app.spec.evaluation import side_name
from app.spec.json_types import JsonObject

PATH = "/evaluations"

RewardModelOption = Annotated[str, typer.Option(help="The judge: a reward model of this service.")]
ClassifierOption = Annotated[str, typer.Option(help="The judge: a classifier, as a file id or a path.")]
JudgeUrlOption = Annotated[
    str, typer.Option(help="The judge: a server of chat completions. Its key is read from DPO_JUDGE_API_KEY.")
]
JudgeModelOption = Annotated[
    str, typer.Option(help="The judge's model there; without --judge-url, a model of this service.")
]
QuestionOption = Annotated[str, typer.Option(help="Its question: dialogue, plain_summary or concise_summary.")]


def evaluate(
    type: Annotated[
        str, typer.Argument(help="preference, win_rate, reward_kl or agreement; default: from --spec.")
    ] = "",
    candidate: Annotated[str, typer.Option(help="A base model, a trained model or a checkpoint.")] = "",
    baseline: Annotated[str, typer.Option(help="A model, or 'reference': that of the candidate's training.")] = "",
    candidate_file: Annotated[str, typer.Option(help="Ready answers instead: a file id, or a path to upload.")] = "",
    baseline_file: Annotated[str, typer.Option(help="Ready answers instead: a file id, or a path to upload.")] = "",
    baseline_answers: Annotated[str, typer.Option(help="The data's own answers instead: chosen or rejected.")] = "",
    data: Annotated[str, typer.Option(help="Held-out rows: a file id, or a path to upload first.")] = "",
    reward_model: RewardModelOption = "",
    classifier: ClassifierOption = "",
    judge_url: JudgeUrlOption = "",
    judge_model: JudgeModelOption = "",
    question: QuestionOption = "",
    temperature: Annotated[list[float] | None, typer.Option(help="A temperature of sampling. Repeatable.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Completions of each prompt.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The longest completion, in tokens.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="The largest number of rows to use.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    gate: Annotated[list[str] | None, typer.Option(help="METRIC>=NUMBER or METRIC<=NUMBER: win_rate/low>=0.5.")] = None,
    spec: Annotated[
        Path | None, typer.Option(help="The body as a JSON file; it may name files by path. '-' for stdin.")
    ] = None,
    idempotency_key: IdempotencyKey = "",
    follow: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    as_json: Json = False,
) -> None:
    """Start an evaluation. Options add to or override the body of --spec.

    With --watch, the exit status is 0 succeeded, 1 failed, 3 cancelled, 4 a gate not met.
    """
    client = Client()
    body = read_body(spec)
    if type:
        body["type"] = type
    if candidate or candidate_file:
        body["candidate"] = _side_from_options(candidate, candidate_file)
    if baseline == "reference":
        body["baseline"] = baseline
    elif baseline or baseline_file or baseline_answers:
        body["baseline"] = _side_from_options(baseline, baseline_file, baseline_answers)
    if data:
        body["data"] = data
    judge = judge_from_options(reward_model, classifier, judge_url, judge_model, question)
    if judge:
        body["judge"] = {**(body.get("judge") or {}), **judge}
    sampling = set_options(temperatures=temperature, samples=samples, max_tokens=max_tokens)
    if sampling:
        body["sampling"] = {**(body.get("sampling") or {}), **sampling}
    body |= set_options(max_rows=max_rows, seed=seed)
    if gate:
        body["gates"] = [*body.get("gates", []), *read_gates(gate)]
    with Uploads(client, idempotency_key) as uploads:
        upload_files(uploads.add, body)
        started = client.request("POST", PATH, json=body, headers=uploads.headers)
    if follow:
        result_files.follow(client, f"{PATH}/{started['id']}", as_json)
    emit(started, as_json, f"{started['id']}: {started['status']}\nfollow it: dpo evaluations watch {started['id']}")


def set_options(**options: object) -> JsonObject:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def _side_from_options(model: str, file: str, answers: str = "") -> JsonObject:
    """The side of an evaluation that the options name."""
    side = {"model": model, "file": file, "answers": answers}
    return {name: value for name, value in side.items() if value}


def judge_from_options(
    reward_model: str, classifier: str, judge_url: str, judge_model: str, question: str
) -> JsonObject:
    """The judge that the options name; empty if they name none."""
    judge: JsonObject = {}
    if judge_url:
        key = os.environ.get("DPO_JUDGE_API_KEY")
        endpoint = {"base_url": judge_url, "model": judge_model, "api_key": key}
        judge = {"type": "endpoint", "endpoint": {name: value for name, value in endpoint.items() if value}}
    elif judge_model:
        judge = {"type": "model", "model": judge_model}
    elif reward_model:
        judge = {"type": "reward_model", "model": reward_model}
    elif classifier:
        judge = {"type": "classifier", "classifier": {"file": classifier}}
    return judge | ({"question": question} if question else {})


def _cells(row: JsonObject) -> JsonObject:
    return {name: side_name(row[name]) for name in ("candidate", "baseline")}


evaluations = group_of(
    "evaluation", "Evaluations of models.", ["id", "status", "type", "candidate", "baseline"], _cells
)
