"""`dpo compare`: two models side by side, for eyes: one page that needs nothing else, and the same as JSON."""

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console

from app.cli.client import Client
from app.cli.evaluations import judge_of
from app.cli.output import Json, emit
from app.cli.watch import EXIT_STATUS, watch
from app.spec.metrics import CHARTS
from app.svg import curves

CURVES = tuple(itertools.chain(*CHARTS.values()))
"""The metrics of a training that the page draws."""


def compare(
    model_a: Annotated[str, typer.Argument(help="A base model, a made model or a checkpoint.")],
    model_b: Annotated[str, typer.Argument(help="Another one.")],
    prompts: Annotated[Path, typer.Option(help="JSONL with a 'prompt' in each row, or text with one in each line.")],
    output: Annotated[Path, typer.Option(help="The page. The same as JSON is written beside it.")] = Path(
        "compare.html"
    ),
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 256,
    max_rows: Annotated[int, typer.Option(min=1, help="Only so many of the prompts.")] = 100,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    reward_model: Annotated[str, typer.Option(help="A judge: a reward model that was made here.")] = "",
    classifier: Annotated[str, typer.Option(help="A judge: a classifier, as a file id or a path.")] = "",
    judge_url: Annotated[
        str, typer.Option(help="A judge: a server of chat completions. Its key is read from DPO_JUDGE_API_KEY.")
    ] = "",
    judge_model: Annotated[
        str, typer.Option(help="The model that is asked there; without --judge-url, one of this service.")
    ] = "",
    question: Annotated[str, typer.Option(help="dialogue, plain_summary or concise_summary.")] = "",
    as_json: Json = False,
) -> None:
    """Write a page with the answers of two models side by side.

    With a judge, its verdicts and the win rate too; where both models have one tokenizer, the KL between them; where
    they were trained here, the curves of their trainings. Exit status: 0, or 1 where the models could not be run.
    """
    if output.suffix == ".json":
        raise typer.BadParameter("is the page; the JSON file is written beside it", param_hint="--output")
    client, console = Client(), Console(stderr=True)
    shared = {
        "data": _upload(client, prompts), "max_rows": max_rows, "seed": seed,
        "sampling": {"temperatures": [temperature], "max_tokens": max_tokens},
    }  # fmt: skip
    sides = {"candidate": {"model": model_a}, "baseline": {"model": model_b}}
    judge = judge_of(client, reward_model, classifier, judge_url, judge_model, question)
    answered = _evaluated(
        client, {"type": "win_rate", **sides, **shared} | ({"judge": judge} if judge else {}), console
    )
    if answered["status"] != "succeeded":
        console.print(f"[red]{(answered['error'] or {}).get('message', answered['status'])}[/]", highlight=False)
        raise typer.Exit(EXIT_STATUS[answered["status"]])
    found = {
        "a": model_a, "b": model_b, "judge": answered["judge"], "sampling": answered["sampling"], "seed": seed,
        "evaluation": answered["id"], "metrics": answered["metrics"], "items": _items(client, answered),
        "kl": _kl(client, sides, shared, console), "trainings": _trainings(client, (model_a, model_b)),
    }  # fmt: skip
    output.write_text(page(found))
    output.with_suffix(".json").write_text(json.dumps(found, ensure_ascii=False, indent=1))
    emit({"page": str(output), "data": str(output.with_suffix(".json"))}, as_json, f"{output}")


def _upload(client: Client, path: Path) -> str:
    """The id of the uploaded prompts; text is made into rows first."""
    if path.suffix != ".txt":
        return str(client.upload(path, {"purpose": "evals"})["id"])
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / f"{path.stem}.jsonl"
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        rows.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
        return str(client.upload(rows, {"purpose": "evals"})["id"])


def _evaluated(client: Client, body: dict[str, Any], console: Console) -> dict[str, Any]:
    made = client.request("POST", "/evaluations", json=body)
    return watch(client, f"/evaluations/{quote(made['id'], safe='')}", console)


def _items(client: Client, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("GET", f"/files/{evaluation['result_files'][1]}/content") as response:
        response.read()
        return [json.loads(line) for line in response.content.splitlines()]


def _kl(
    client: Client, sides: dict[str, Any], shared: dict[str, Any], console: Console
) -> dict[str, dict[str, float | None]] | None:
    """KL(a‖b) and KL(b‖a) in nats a completion, of the models as they are, at temperature 1; None where undefined."""
    found, sampling = {}, shared["sampling"] | {"temperatures": [1.0]}
    for name, (one, other) in {"a_to_b": ("candidate", "baseline"), "b_to_a": ("baseline", "candidate")}.items():
        asked = {"type": "reward_kl", "candidate": sides[one], "baseline": sides[other], **shared, "sampling": sampling}
        evaluation = _evaluated(client, asked, console)
        if evaluation["status"] != "succeeded":
            console.print(f"No KL: {(evaluation['error'] or {}).get('message', '')}", style="yellow", highlight=False)
            return None
        found[name] = {
            part: evaluation["metrics"].get(f"kl{end}") for part, end in (("value", ""), ("error", "/error"))
        }
    return found


def _trainings(client: Client, models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The curves of the trainings that made the models, by model."""
    found = {}
    for model in models:
        steps = client.request("GET", f"/models/{quote(model, safe=':')}/lineage")["steps"]
        whole = model.partition(":ckpt-step-")[0]
        made = [step["job"] for step in steps if step["model"].partition(":ckpt-step-")[0] == whole]
        if made:
            series = client.request("GET", f"/fine_tuning/jobs/{made[0]}/metrics", params={"points": 200})["series"]
            found[model] = {name: points for name, points in series.items() if name in CURVES}
    return found


def page(found: dict[str, Any]) -> str:
    """The page of a comparison. Everything that it needs is in it, and nothing in it is loaded or run."""
    # Imported here: nothing else that the command line does needs templates, and each command would wait for them.
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(loader=PackageLoader("app.cli", "templates"), autoescape=select_autoescape())
    environment.filters["number"] = lambda value: f"{value:.3g}"
    charts = []
    for name in CURVES:
        lines = {
            label: [(point["step"], point["value"]) for point in found["trainings"][model][name]]
            for label, model in (("A", found["a"]), ("B", found["b"]))
            if found["trainings"].get(model, {}).get(name)
        }
        if lines:
            charts.append(curves(lines, name))  # safe in the page: its texts are escaped
    template = environment.get_template("compare.html")
    return template.render(**found, charts=charts, winner=_winner)


def _winner(item: dict[str, Any]) -> str:
    """A, B or neither, as the judge says; nothing without one."""
    if "verdicts" in item:
        if None in item["verdicts"]:
            return "not understood"
        points = sum((one == "candidate") - (one == "baseline") for one in item["verdicts"])
    elif "candidate_reward" in item:
        points = item["candidate_reward"] - item["baseline_reward"]
    else:
        return ""
    return "A" if points > 0 else "B" if points < 0 else "neither"
