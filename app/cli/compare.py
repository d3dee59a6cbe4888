"""`dpo compare`: two models side by side, on one self-contained page and in one JSON file."""

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console

from app.cli.client import Client
from app.cli.evaluations import (
    ClassifierOption,
    JudgeModelOption,
    JudgeUrlOption,
    QuestionOption,
    RewardModelOption,
    judge_from_options,
)
from app.cli.output import Json, emit, plain
from app.cli.uploads import Uploads, upload_files
from app.cli.watch import EXIT_STATUS, watch
from app.spec.json_types import JsonObject
from app.spec.metrics import CHARTS
from app.svg import curves

CURVES = tuple(itertools.chain(*CHARTS.values()))
"""The training metrics that the page draws."""


def compare(
    model_a: Annotated[str, typer.Argument(help="A base model, a trained model or a checkpoint.")],
    model_b: Annotated[str, typer.Argument(help="The other model.")],
    prompts: Annotated[Path, typer.Option(help="JSONL with a 'prompt' in each row, or text with one in each line.")],
    output: Annotated[Path, typer.Option(help="The page. A JSON file with the same data is written beside it.")] = Path(
        "compare.html"
    ),
    temperature: Annotated[float, typer.Option(min=0, help="The temperature of sampling.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    max_rows: Annotated[int, typer.Option(min=1, help="The largest number of prompts to use.")] = 100,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    reward_model: RewardModelOption = "",
    classifier: ClassifierOption = "",
    judge_url: JudgeUrlOption = "",
    judge_model: JudgeModelOption = "",
    question: QuestionOption = "",
    as_json: Json = False,
) -> None:
    """Write a page with the answers of two models side by side.

    With a judge, the page has its verdicts and the win rate. If both models have the same tokenizer, it has the KL
    between them. If they were trained here, it has their training curves. Exit status: 0, or 1 if a model cannot run.
    """
    if output.suffix == ".json":
        raise typer.BadParameter("names the page; the JSON file is written beside it", param_hint="--output")
    client, console = Client(), Console(stderr=True)
    sampling = {"temperatures": [temperature], "max_tokens": max_tokens}
    sides = {"candidate": {"model": model_a}, "baseline": {"model": model_b}}
    judge = judge_from_options(reward_model, classifier, judge_url, judge_model, question)
    with Uploads(client) as uploads:
        shared = {"data": _upload(uploads, prompts), "max_rows": max_rows, "seed": seed, "sampling": sampling}
        body = {"type": "win_rate", **sides, **shared} | ({"judge": judge} if judge else {})
        upload_files(uploads.add, body)  # the judge may have a file too
        started = client.request("POST", "/evaluations", json=body)
    evaluation = _watch(client, started, console)
    if evaluation["status"] != "succeeded":
        message = (evaluation["error"] or {}).get("message", evaluation["status"])
        console.print(plain(str(message)), style="red", highlight=False, markup=False)
        raise typer.Exit(EXIT_STATUS[evaluation["status"]])
    comparison = {
        "a": model_a, "b": model_b, "judge": evaluation["judge"], "sampling": evaluation["sampling"], "seed": seed,
        "evaluation": evaluation["id"], "metrics": evaluation["metrics"], "items": _items(client, evaluation),
        "kl": _kl(client, sides, shared, console), "trainings": _trainings(client, (model_a, model_b)),
    }  # fmt: skip
    output.write_text(page(comparison))
    output.with_suffix(".json").write_text(json.dumps(comparison, ensure_ascii=False, indent=1))
    emit({"page": str(output), "data": str(output.with_suffix(".json"))}, as_json, f"{output}")


def _upload(uploads: Uploads, path: Path) -> str:
    """Upload the prompts; returns the file id. Each line of a text file becomes a row first."""
    if path.suffix != ".txt":
        return uploads.add(path, "evals")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / f"{path.stem}.jsonl"
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        rows.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
        return uploads.add(rows, "evals")


def _watch(client: Client, evaluation: JsonObject, console: Console) -> JsonObject:
    """Follow an evaluation to its end; returns it."""
    return watch(client, f"/evaluations/{quote(evaluation['id'], safe='')}", console)


def _items(client: Client, evaluation: JsonObject) -> list[JsonObject]:
    """The rows of an evaluation's items file, one for each prompt."""
    with client.stream("GET", f"/files/{evaluation['result_files'][1]}/content") as response:
        response.read()
        return [json.loads(line) for line in response.content.splitlines()]


def _kl(
    client: Client, sides: JsonObject, shared: JsonObject, console: Console
) -> dict[str, dict[str, float | None]] | None:
    """KL(a‖b) and KL(b‖a) of the models at temperature 1, in nats per completion; None if undefined."""
    kl, sampling = {}, shared["sampling"] | {"temperatures": [1.0]}
    for name, (left, right) in {"a_to_b": ("candidate", "baseline"), "b_to_a": ("baseline", "candidate")}.items():
        body = {"type": "reward_kl", "candidate": sides[left], "baseline": sides[right], **shared, "sampling": sampling}
        evaluation = _watch(client, client.request("POST", "/evaluations", json=body), console)
        if evaluation["status"] != "succeeded":
            message = plain(f"No KL: {(evaluation['error'] or {}).get('message', '')}")
            console.print(message, style="yellow", highlight=False, markup=False)
            return None
        kl[name] = {
            figure: evaluation["metrics"].get(f"kl{suffix}") for figure, suffix in (("value", ""), ("error", "/error"))
        }
    return kl


def _trainings(client: Client, models: Sequence[str]) -> dict[str, JsonObject]:
    """The training curves of each model that was trained here, by model."""
    trainings = {}
    for model in models:
        steps = client.request("GET", f"/models/{quote(model, safe=':')}/lineage")["steps"]
        name_without_step = model.partition(":ckpt-step-")[0]
        jobs = [step["job"] for step in steps if step["model"].partition(":ckpt-step-")[0] == name_without_step]
        if jobs:
            series = client.request("GET", f"/fine_tuning/jobs/{jobs[0]}/metrics", params={"points": 200})["series"]
            trainings[model] = {name: points for name, points in series.items() if name in CURVES}
    return trainings


def page(comparison: JsonObject) -> str:
    """The page of a comparison. It is self-contained: it loads nothing and runs nothing."""
    # Imported here, because no other command needs templates and each would wait for the import.
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(loader=PackageLoader("app.cli", "templates"), autoescape=select_autoescape())
    environment.filters["number"] = lambda value: f"{value:.3g}"
    charts = []
    for name in CURVES:
        lines = {
            label: [(point["step"], point["value"]) for point in comparison["trainings"][model][name]]
            for label, model in (("A", comparison["a"]), ("B", comparison["b"]))
            if comparison["trainings"].get(model, {}).get(name)
        }
        if lines:
            charts.append(curves(lines, name))  # safe in the page: the texts of the SVG are escaped
    template = environment.get_template("compare.html")
    return template.render(**comparison, charts=charts, winner=_winner)


def _winner(item: JsonObject) -> str:
    """The judge's verdict: A, B or neither; empty without a judge."""
    if "verdicts" in item:
        if None in item["verdicts"]:
            return "not understood"
        points = sum((verdict == "candidate") - (verdict == "baseline") for verdict in item["verdicts"])
    elif "candidate_reward" in item:
        points = item["candidate_reward"] - item["baseline_reward"]
    else:
        return ""
    return "A" if points > 0 else "B" if points < 0 else "neither"
