"""`make demo`: preference pairs → upload → job → queue → QLoRA SFT → DPO → adapter, over HTTP.

The exit status is 0 only if the model became better. The held-out reward accuracy must be at least 0.8. The true reward
of sampled completions must rise from the base to SFT and from SFT to DPO, each time by two standard errors.
"""

import argparse
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from app.cli.client import Client, ClientError
from app.cli.watch import watch
from app.programs import command
from app.settings import Settings
from app.spec.json_types import JsonObject
from demo import base_model, sampling, world

PAIRS, HELD_OUT, DEMONSTRATIONS, SAMPLES = 800, 150, 500, 400
console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Sampled:
    """Completions of one model and their true rewards."""

    name: str
    texts: list[str]

    @property
    def rewards(self) -> list[int]:
        return [world.reward(text) for text in self.texts]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rewards)

    @property
    def standard_error(self) -> float:
        return statistics.stdev(self.rewards) / math.sqrt(len(self.rewards))


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--swap", action="store_true", help="swap chosen and rejected: the demo must then fail")
    swap: bool = parser.parse_args().swap
    warnings.filterwarnings("ignore")
    began = time.monotonic()
    settings = Settings()
    base_model.ensure(settings, console)
    with Service(settings) as client, tempfile.TemporaryDirectory() as data_folder:
        files = upload(client, Path(data_folder), swap)
        job = run_job(client, files)
        if job["status"] != "succeeded":
            console.print(f"[red]The job ended as {job['status']}.[/]")
            return 1
        folder = settings.home / "demo" / job["id"]
        adapters = download(client, job, folder)
        before, after = held_out_metrics(client, job)
    console.print(f"5. Sampling {SAMPLES} completions from each model")
    sampled = [
        Sampled(name, sampling.complete(settings.models_dir / base_model.NAME, adapter, SAMPLES))
        for name, adapter in (("base", None), ("SFT", adapters["sft"]), ("DPO", adapters["dpo"]))
    ]
    show(before, after, sampled)
    problems = verdict(after, sampled)
    for problem in problems:
        console.print(f"[red]Not better:[/] {problem}")
    console.print(f"\nThe adapter is in {adapters['dpo']}\n{time.monotonic() - began:.0f} s in all.", highlight=False)
    if not problems:
        console.print("Next: [bold]make serve[/], and the README's 'A job by hand'.")
    return 1 if problems else 0


class Service:
    """`dpo serve` on a free port, with the embedded defaults. It is stopped at the end of the block."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __enter__(self) -> Client:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = self.settings.home / "demo" / "serve.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"DPO_PORT": str(port), "DPO_HOST": "127.0.0.1"}
        with self.log.open("wb") as output:
            serve = command("app.cli.main", "serve")
            self.process = subprocess.Popen(serve, env=environment, stdout=output, stderr=output)
        url = f"http://127.0.0.1:{port}/v1"
        console.print(f"2. The service starts on {url}: API, GPU lane, CPU lane (its log: {self.log})", highlight=False)
        os.environ |= {"DPO_BASE_URL": url, "DPO_API_KEY": self.settings.admin_key}
        try:
            return self._client()
        except BaseException:
            self.__exit__()
            raise

    def _client(self) -> Client:
        client, deadline = Client(), time.monotonic() + 60
        while True:
            try:
                names = [model["id"] for model in client.request("GET", "/models")["data"]]
                if base_model.NAME in names:
                    return client
            except ClientError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"The service did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def upload(client: Client, folder: Path, swap: bool) -> dict[str, str]:
    datasets: dict[str, list[dict[str, str]]] = {
        "demonstrations": world.demonstrations(DEMONSTRATIONS, seed=2),
        "preferences": world.preferences(PAIRS, seed=3, swap=swap),
        "held-out": world.preferences(HELD_OUT, seed=4),
    }
    console.print("3. Uploading: " + ", ".join(f"{len(rows)} {name}" for name, rows in datasets.items()))
    ids = {}
    for name, rows in datasets.items():
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        ids[name] = client.upload(path)["id"]
    return ids


def run_job(client: Client, files: dict[str, str]) -> JsonObject:
    """Run QLoRA SFT and then DPO, in one job; returns the ended job."""
    body = {
        "model": base_model.NAME,
        "training_file": files["preferences"],
        "validation_file": files["held-out"],
        "sft": {
            "training_file": files["demonstrations"],
            "hyperparameters": {"learning_rate": 1e-3, "n_epochs": 2, "batch_size": 16},
        },
        "method": {
            "type": "dpo",
            "dpo": {"hyperparameters": {"beta": 0.1, "learning_rate": 1.5e-4, "n_epochs": 1, "batch_size": 16}},
        },
        "adapter": {"r": 16, "alpha": 32},
        "quantization": "nf4",
        "suffix": "demo",
        "seed": 7,
    }
    job = client.request("POST", "/fine_tuning/jobs", json=body)
    console.print(f"4. One job, SFT then DPO on a 4-bit base: {job['id']}", highlight=False)
    return watch(client, f"/fine_tuning/jobs/{job['id']}", console)


def download(client: Client, job: JsonObject, folder: Path) -> dict[str, Path]:
    """The adapters after SFT and after DPO."""
    checkpoints = client.pages(f"/fine_tuning/jobs/{job['id']}/checkpoints", limit=100)
    sft = next(checkpoint["fine_tuned_model_checkpoint"] for checkpoint in checkpoints if checkpoint["stage"] == "sft")
    folders = {"sft": folder / "sft", "dpo": folder / "dpo"}
    for stage, name in (("sft", sft), ("dpo", job["fine_tuned_model"])):
        client.download_model(name, folders[stage])
    return folders


def held_out_metrics(client: Client, job: JsonObject) -> tuple[dict[str, float], dict[str, float]]:
    """The DPO stage's metrics on held-out pairs: (at its start, at its end)."""
    events = client.pages(f"/fine_tuning/jobs/{job['id']}/events", limit=1000)
    validations = [  # newest first
        event["data"]
        for event in events
        if event["type"] == "metrics" and event["data"]["stage"] == "dpo" and "eval/loss" in event["data"]
    ]
    return validations[-1], validations[0]


def show(before: dict[str, float], after: dict[str, float], sampled: list[Sampled]) -> None:
    table = Table("held-out pairs", "before DPO", "after DPO", title="What the service measured", title_justify="left")
    for name, label in (
        ("eval/loss", "DPO loss (ln 2 = 0.693 at the start)"),
        ("eval/rewards/accuracies", "reward accuracy (no margins at the start)"),
        ("eval/rewards/margins", "reward margin"),
    ):
        table.add_row(label, f"{before[name]:.3f}", f"{after[name]:.3f}")
    console.print(table)
    title = "The true reward of sampled completions"
    table = Table("model", "true reward", "standard error", title=title, title_justify="left")
    for model in sampled:
        table.add_row(model.name, f"{model.mean:+.3f}", f"{model.standard_error:.3f}")
    console.print(table)
    title = "Completions of the same prompts, with their true rewards"
    table = Table(*(model.name for model in sampled), title=title, title_justify="left")
    for number in range(3):
        table.add_row(*(f"{model.rewards[number]:+d}  {model.texts[number].strip()}" for model in sampled))
    Console().print(table)


def verdict(after: dict[str, float], sampled: list[Sampled]) -> list[str]:
    """The conditions of success that do not hold."""
    problems = []
    accuracy = after["eval/rewards/accuracies"]
    if accuracy < 0.8:
        problems.append(f"the held-out reward accuracy is {accuracy:.2f}, below 0.8")
    for worse, better in pairwise(sampled):
        error = (worse.standard_error**2 + better.standard_error**2) ** 0.5
        if better.mean - worse.mean <= 2 * error:
            problems.append(f"{better.name} is not above {worse.name} by two standard errors")
    return problems


if __name__ == "__main__":
    sys.exit(main())
