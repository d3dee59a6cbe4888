"""`dpo label` and `dpo labellings`: make preference data from prompts."""

from pathlib import Path
from typing import Annotated

import typer

from app.cli.client import Client
from app.cli.evaluations import (
    ClassifierOption,
    JudgeModelOption,
    JudgeUrlOption,
    QuestionOption,
    RewardModelOption,
    judge_from_options,
    set_options,
)
from app.cli.output import Json, emit, read_body
from app.cli.result_files import follow, group_of
from app.cli.uploads import IdempotencyKey, Uploads, upload_files
from app.spec.json_types import JsonObject

PATH = "/labellings"


def label(
    data: Annotated[str, typer.Option(help="Prompts: a file id, or a path to upload first.")] = "",
    writer: Annotated[list[str] | None, typer.Option(help="A model that answers. Repeatable.")] = None,
    own_answers: Annotated[bool | None, typer.Option(help="Also label the answers that the data has.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers of each writer to a prompt.")] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="A temperature of sampling. Repeatable.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The longest answer, in tokens.")] = None,
    reward_model: RewardModelOption = "",
    classifier: ClassifierOption = "",
    judge_url: JudgeUrlOption = "",
    judge_model: JudgeModelOption = "",
    question: QuestionOption = "",
    max_rows: Annotated[int | None, typer.Option(min=1, help="The largest number of prompts to use.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    spec: Annotated[
        Path | None, typer.Option(help="The body as a JSON file; it may name files by path. '-' for stdin.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only say what it would write, ask and cost.")] = False,
    idempotency_key: IdempotencyKey = "",
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,
    as_json: Json = False,
) -> None:
    """Answer prompts and label the answers. Options add to or override the body of --spec.

    With --watch, the exit status is 0 succeeded, 1 failed, 3 cancelled, 4 a gate not met.
    """
    client, body = Client(), read_body(spec)
    body |= set_options(data=data or None, own_answers=own_answers, max_rows=max_rows, seed=seed)
    if writer:
        body["writers"] = [{"model": name} for name in writer]
    sampling = set_options(temperatures=temperature, samples=samples, max_tokens=max_tokens)
    if sampling:
        body["sampling"] = {**(body.get("sampling") or {}), **sampling}
    judge = judge_from_options(reward_model, classifier, judge_url, judge_model, question)
    if judge:
        body["labellers"] = [{"judge": judge}, *body.get("labellers", [])]
    with Uploads(client, idempotency_key) as uploads:
        upload_files(uploads.add, body)
        if estimate:
            estimated = client.when_ready("POST", f"{PATH}/estimate", json=body)
            emit(estimated, as_json, "\n".join(f"{name}: {value}" for name, value in estimated.items()))
            return
        started = client.request("POST", PATH, json=body, headers=uploads.headers)
    if watch:
        follow(client, f"{PATH}/{started['id']}", as_json)
    emit(started, as_json, f"{started['id']}: {started['status']}\nfollow it: dpo labellings watch {started['id']}")


def _cells(row: JsonObject) -> JsonObject:
    """The writers and labellers of a labelling by name."""
    writers = [writer.get("model") or writer["endpoint"]["model"] for writer in row["writers"]]
    kinds = ("judge", "grader", "people")
    labellers = [one.get("name") or next(kind for kind in kinds if kind in one) for one in row["labellers"]]
    return {"writers": ", ".join(writers), "labellers": ", ".join(labellers)}


labellings = group_of("labelling", "Labellings of answers.", ["id", "status", "writers", "labellers", "file"], _cells)
