"""`python -m bench.sentiment`: the controlled sentiment experiment of the DPO paper (Rafailov et al. 2023, Sec. 6.1).

The true reward is known: a classifier of reviews.

1. A small language model of IMDb reviews is fine-tuned on reviews (SFT).
2. It writes four completions of each prefix, which make six pairs.
3. Each method is trained on the pairs from the SFT model: DPO, IPO, unlikelihood, Preferred-FT and Plackett–Luce. Best
   of N needs no training. TRL's RLOO trains on the true reward itself. (TRL ships no PPO any more.)
4. Each model is measured on held-out prefixes: the mean true reward, and the sequence KL to the SFT model.

All but RLOO runs through this service's own API, and its evaluations measure everything. Finished steps are kept in
`--folder`, so the same command resumes where it was stopped.
"""

import argparse
import gzip
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations, pairwise
from pathlib import Path
from urllib.parse import quote

import httpx2
from rich.console import Console
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from app.spec.json_types import JsonObject
from app.sweeps.frontier import ParetoPoint, as_csv, pareto, svg
from bench.machine import describe_machine
from tests.helpers.servers import free_port, wait_until
from worker.classifier import export

RESULT = Path(__file__).parent / "results" / "sentiment.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "sentiment.svg"
BASE = "imdb-llama-2.5m"
BETAS, ALPHAS, STRENGTHS = (0.05, 0.1, 1.0, 5.0), (0.05, 0.1, 0.5, 1.0), (0.01, 0.03, 0.1, 0.3)
"""The settings: β of DPO and Plackett–Luce, α of unlikelihood, and the weight of RLOO's KL penalty."""
SAMPLES, MAX_TOKENS, BEST_OF = 4, 48, 64
"""Completions of each prefix, their maximum length in tokens, and the largest N of best of N."""
REVIEW_WORDS = 30
"""SFT learns this many words of each review, so that most completions end within `MAX_TOKENS`. A completion that is cut
would teach the methods an end that nobody wrote."""
MAX_DRAWN_KL = 20.0
"""The largest KL in the picture, in nats. The tables have the points beyond it."""
console = Console()


@dataclass(frozen=True)
class Scale:
    """The size of the experiment."""

    reviews: int = 6000
    """Reviews for SFT."""
    prompts: int = 600
    """Prefixes for training."""
    held_out: int = 150
    """Prefixes for measuring."""
    batch_size: int = 32
    """Pairs of an optimizer step."""
    rloo_steps: int = 40
    """Steps of 64 completions: together about as many as the preferences are made of."""
    points: int = 2
    """How often a run is evaluated, the last time at its end."""


QUICK = Scale(reviews=200, prompts=24, held_out=12, batch_size=16, rloo_steps=2, points=1)
KLS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Nats at which frontiers are compared."""
THRICE = ", 3 epochs"
"""The end of the names of methods that train for three epochs."""
START = "No preferences"
"""The name of the base model and the SFT model among the methods."""


class State:
    """The results of finished steps by name, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: JsonObject = json.loads(path.read_text()) if path.exists() else {}

    def keep(self, name: str, value: object) -> None:
        """Write the result of a step."""
        self.done[name] = value
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.done))
        partial.replace(self.path)


class Api:
    """The service over HTTP. An upload or a create under a name happens once."""

    def __init__(self, url: str, key: str, state: State) -> None:
        self.state = state
        self.http = httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120)

    def upload(self, name: str, path: Path, purpose: str = "fine-tune") -> str:
        if name not in self.state.done:
            with path.open("rb") as file:
                answer = self.http.post("/files", files={"file": (path.name, file)}, data={"purpose": purpose})
            self.state.keep(name, _ok(answer)["id"])
        return str(self.state.done[name])

    def start(self, name: str, path: str, body: JsonObject) -> str:
        """Create the job or evaluation `name`, unless an earlier run did. Returns its id."""
        if name not in self.state.done:
            key = sha256(f"{name} {json.dumps(body, sort_keys=True)}".encode()).hexdigest()
            self.state.keep(name, _ok(self.http.post(path, json=body, headers={"Idempotency-Key": key}))["id"])
        return str(self.state.done[name])

    def ended(self, path: str, job_id: str) -> JsonObject:
        """Wait until a job or evaluation has succeeded. Returns it. Raises `RuntimeError` if it fails."""
        while True:
            job = _ok(self.http.get(f"{path}/{job_id}"))
            if job["status"] in ("failed", "cancelled"):
                raise RuntimeError(f"{job_id} {job['status']}: {job['error']}")
            if job["status"] == "succeeded":
                return job
            time.sleep(0.5)

    def items(self, evaluation: JsonObject) -> list[JsonObject]:
        """The items of an evaluation: one for each completion."""
        content = self.http.get(f"/files/{evaluation['result_files'][1]}/content").raise_for_status().text
        return [json.loads(line) for line in content.rstrip("\n").split("\n")]

    def download(self, model: str, folder: Path) -> None:
        with self.http.stream("GET", f"/models/{quote(model, safe=':')}/download") as answer:
            content = b"".join(answer.raise_for_status().iter_bytes())
        folder.mkdir(parents=True)
        (folder / "model.tar").write_bytes(content)
        with tarfile.open(folder / "model.tar") as archive:
            archive.extractall(folder, filter="data")
        (folder / "model.tar").unlink()


def _ok(answer: httpx2.Response) -> JsonObject:
    """The body of an answer. Raises `RuntimeError` for an error."""
    if answer.status_code >= 400:
        raise RuntimeError(f"{answer.request.url}: {answer.text}")
    body: JsonObject = answer.json()
    return body


JOBS, EVALUATIONS = "/fine_tuning/jobs", "/evaluations"


@contextmanager
def service(home: Path, state: State) -> Iterator[Api]:
    """Run this repository's service with its embedded default. Its base models are in `home`/models."""
    port = free_port()
    environment = os.environ | {"DPO_HOME": str(home), "DPO_PORT": str(port), "DPO_RATE_LIMIT": "0"}
    with (home / "serve.log").open("ab") as log:
        command = [sys.executable, "-m", "app.cli.main", "serve"]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: httpx2.get(f"{url}/readyz").status_code == 200, "the service")
        api = Api(f"{url}/v1", (home / "admin.key").read_text().strip(), state)
        wait_until(lambda: len(_ok(api.http.get("/models"))["data"]) > 0, "its models")
        yield api
    finally:
        process.terminate()
        process.wait(120)


# -- data --------------------------------------------------------------------------------------------------------------


def reviews(path: Path) -> Iterator[JsonObject]:
    """The distinct reviews of a file, with line breaks in place of `<br />`."""
    seen = set[str]()
    with gzip.open(path, "rt") as file:
        for line in file:
            review = json.loads(line)
            text = review["text"].replace("<br /><br />", "\n\n").replace("<br />", "\n")
            if text not in seen:
                seen.add(text)
                yield {"text": text, "label": review.get("label")}


def make_classifier(shared: Path, folder: Path) -> dict[str, float]:
    """Make the true reward: TF-IDF of words and pairs of words, then logistic regression, as a file for the service.

    It is trained on half of the labelled reviews and tested on the other half. Returns both numbers and its accuracy.
    """
    labelled = list(reviews(shared / "imdb-train.jsonl.gz"))
    random.Random(0).shuffle(labelled)
    half = len(labelled) // 2
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=5, max_features=100_000, sublinear_tf=True)
    train, test = labelled[:half], labelled[half:]
    features = vectorizer.fit_transform([review["text"] for review in train])
    model = LogisticRegression(C=10, max_iter=1000).fit(features, [review["label"] == "pos" for review in train])
    predicted = model.predict(vectorizer.transform([review["text"] for review in test]))
    correct = predicted == [review["label"] == "pos" for review in test]
    export(folder / "classifier.json", vectorizer, model)
    return {"trained_on": half, "tested_on": len(test), "accuracy": float(correct.mean())}


def make_files(shared: Path, folder: Path, scale: Scale) -> None:
    """Write prefixes of 4 to 8 words with their continuations for SFT, and prefixes of other reviews, some held out."""
    generator, rows = random.Random(1), []
    for number, review in enumerate(reviews(shared / "imdb-unsup.jsonl.gz")):
        words = review["text"].split()
        if len(words) >= REVIEW_WORDS:
            cut = generator.randint(4, 8)
            rows.append({"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:REVIEW_WORDS])})
        if number > 3 * (scale.reviews + scale.prompts + scale.held_out):
            break
    generator.shuffle(rows)
    sft, rest = rows[: scale.reviews], rows[scale.reviews :]
    prompts = [{"prompt": row["prompt"]} for row in rest[: scale.prompts + scale.held_out]]
    _write(folder / "sft.jsonl", sft)
    _write(folder / "prompts.jsonl", prompts[: scale.prompts])
    _write(folder / "held_out.jsonl", prompts[scale.prompts :])  # written last: if it exists, all exist


def _write(path: Path, rows: Sequence[JsonObject]) -> Path:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return partial.rename(path)


def make_preferences(items: Sequence[JsonObject], folder: Path, seed: int) -> dict[str, Path]:
    """Write preferences by the true reward. The four completions of a prefix give six pairs and one ranked list.

    `preferred` has the better answer of each pair. Returns the file of each form.
    """
    by_row: dict[int, list[JsonObject]] = {}
    for item in items:
        by_row.setdefault(item["row"], []).append(item)
    pairs, ranked, best = [], [], []
    for completions in by_row.values():
        order = sorted(completions, key=lambda item: -item["reward"])
        for better, worse in combinations(order, 2):
            if better["reward"] > worse["reward"] and better["text"] != worse["text"]:
                sides = {"chosen": better["text"], "rejected": worse["text"]}
                pairs.append({"prompt": better["prompt"], **sides})
                best.append({"prompt": better["prompt"], "completion": better["text"]})
        if len({item["text"] for item in order}) == len(order):
            ranked.append({"prompt": order[0]["prompt"], "responses": [item["text"] for item in order]})
    rows = {"ranked": ranked, "preferred": best, "pairs": pairs}  # pairs last: if they exist, all exist
    return {name: _write(folder / f"{name}-{seed}.jsonl", form_rows) for name, form_rows in rows.items()}


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A training from the SFT model: its method, the varied setting, its data and hyperparameters."""

    method: str
    setting: str
    data: str
    hyperparameters: JsonObject
    epochs: int = 1
    share: float = 1.0
    """Its batch size, as a share of the batch size of pairs over one epoch. The engine computes each text once, so six
    pairs cost as much as a list of four. A sixth of the rows then gives steps with equally many texts."""

    @property
    def name(self) -> str:
        return f"{self.method} {self.setting}".strip()


def runs() -> list[Run]:
    """The trainings of one seed. All have LoRA of rank 16, the same learning rate, and as many steps.

    With `THRICE` they see each text three times, in steps of three times as many.
    """
    lists = {"loss": "plackett_luce"}
    return [
        *(Run("DPO", f"β={beta:g}", "pairs", {"loss": "sigmoid", "beta": beta}) for beta in BETAS),
        Run("IPO", "β=0.1", "pairs", {"loss": "ipo", "beta": 0.1, "ipo_length_average": False}),
        *(
            Run("Unlikelihood", f"α={alpha:g}", "pairs", {"loss": "unlikelihood", "unlikelihood_alpha": alpha})
            for alpha in ALPHAS
        ),
        Run("Preferred-FT", "", "preferred", {}),
        *(Run("Plackett–Luce", f"β={beta:g}", "ranked", lists | {"beta": beta}, share=1 / 6) for beta in BETAS),
        *(Run(f"DPO{THRICE}", f"β={beta:g}", "pairs", {"loss": "sigmoid", "beta": beta}, 3, 3.0) for beta in BETAS),
        *(Run(f"Plackett–Luce{THRICE}", f"β={beta:g}", "ranked", lists | {"beta": beta}, 3, 1 / 2) for beta in BETAS),
    ]  # fmt: skip


class Experiment:
    """All phases. Each can be stopped and resumed."""

    def __init__(self, folder: Path, shared: Path, scale: Scale, seeds: Sequence[int], rloo_seeds: int) -> None:
        self.folder, self.shared, self.scale, self.seeds = folder, shared, scale, seeds
        self.strengths = {seed: STRENGTHS if number < rloo_seeds else () for number, seed in enumerate(seeds)}
        self.home = folder / "home"
        self.state = State(folder / "state.json")

    def run(self) -> Iterator[JsonObject]:
        """Run all phases. Yields the results so far after each seed."""
        self._prepare()
        with service(self.home, self.state) as api:
            sft = self._sft(api)
            if not (self.folder / "sft").exists():
                api.download(sft, self.folder / "sft")
        for seed in self.seeds:
            for strength in self.strengths[seed]:
                self._rloo(strength, seed)
            with service(self.home, self.state) as api:
                self._train_and_measure(api, sft, seed)
                self._best_of(api, sft)
            yield self._results()

    def _prepare(self) -> None:
        scale = vars(self.scale)
        if self.state.done.setdefault("scale", scale) != scale:
            raise SystemExit(f"{self.folder} holds an experiment of another scale: name another --folder.")
        (self.home / "models").mkdir(parents=True, exist_ok=True)
        if not (self.home / "models" / BASE).exists():
            shutil.copytree(self.shared / "models" / BASE, self.home / "models" / BASE)
        if "classifier" not in self.state.done:
            console.print("The true reward: training the classifier")
            self.state.keep("classifier", make_classifier(self.shared / "data" / "sentiment", self.folder))
        if not (self.folder / "held_out.jsonl").exists():
            make_files(self.shared / "data" / "sentiment", self.folder, self.scale)

    def _sft(self, api: Api) -> str:
        """Train the SFT model. Returns its name."""
        settings = {"n_epochs": 1, "batch_size": 32, "learning_rate": 2e-4}
        body = {
            "model": BASE, "training_file": api.upload("file|sft", self.folder / "sft.jsonl"), "adapter": "none",
            "seed": 0, "suffix": "sft", "method": {"type": "supervised", "supervised": {"hyperparameters": settings}},
        }  # fmt: skip
        return str(api.ended(JOBS, api.start("job|sft", JOBS, body))["fine_tuned_model"])

    def _sampled(self, api: Api, name: str, candidate: str, baseline: str, file: str, samples: int, seed: int) -> str:
        """Start an evaluation of completions: their true rewards, and their KL to the baseline. Returns its id."""
        body = {
            "type": "reward_kl", "candidate": {"model": candidate}, "baseline": {"model": baseline}, "seed": seed,
            "data": api.upload(f"file|{file}", self.folder / f"{file}.jsonl", "evals"), "quantization": "none",
            "sampling": {"temperatures": [1.0], "max_tokens": MAX_TOKENS, "samples": samples},
            "judge": {"type": "classifier", "classifier": {
                "file": api.upload("file|classifier", self.folder / "classifier.json", "evals")}},
        }  # fmt: skip
        return api.start(f"evaluation|{name}", EVALUATIONS, body)

    def _train_and_measure(self, api: Api, sft: str, seed: int) -> None:
        """Train all runs of a seed and measure them, the base model, the SFT model and RLOO's models."""
        completions = api.ended(
            EVALUATIONS, self._sampled(api, f"draw|{seed}", sft, sft, "prompts", SAMPLES, seed=1000 + seed)
        )  # fmt: skip
        if not (self.folder / f"pairs-{seed}.jsonl").exists():
            make_preferences(api.items(completions), self.folder, seed)
        self._measure(api, f"{START}|base model|{seed}|final", BASE, sft, seed)
        self._measure(api, f"{START}|SFT|{seed}|final", sft, sft, seed)
        for strength in self.strengths[seed]:
            for place in range(1, self.scale.points + 1):
                name = f"RLOO|β={strength:g}|{seed}|{self._place(place)}"
                self._measure(api, name, self._rloo_model(strength, seed, place), sft, seed)
        for run in runs():
            name = f"{run.method}|{run.setting}|{seed}"
            if f"measured|{name}|final" in self.state.done:
                continue
            job = api.ended(JOBS, api.start(f"job|{name}", JOBS, self._body(api, run, sft, seed)))
            kept = {key: job[key] for key in ("metrics", "trained_tokens", "running_seconds")}
            self.state.keep(f"job-object|{name}", kept)
            checkpoints = _ok(api.http.get(f"{JOBS}/{job['id']}/checkpoints", params={"limit": 100}))["data"]
            checkpoints.sort(key=lambda checkpoint: int(checkpoint["step_number"]))
            for place, checkpoint in enumerate(checkpoints[: self.scale.points - 1], 1):
                model = checkpoint["fine_tuned_model_checkpoint"]
                self._measure(api, f"{name}|{self._place(place)}", model, sft, seed)
            self._measure(api, f"{name}|final", job["fine_tuned_model"], sft, seed)

    def _place(self, place: int) -> str:
        """The name of a place at which a run is evaluated, such as `1/2` or `final`."""
        return "final" if place == self.scale.points else f"{place}/{self.scale.points}"

    def _body(self, api: Api, run: Run, sft: str, seed: int) -> JsonObject:
        """The body of the job of a run."""
        file = self.folder / f"{run.data}-{seed}.jsonl"
        rows = sum(1 for _ in file.open())
        batch = round(self.scale.batch_size * run.share)
        steps = math.ceil(rows * 0.98 * run.epochs / batch)
        settings = {
            "n_epochs": run.epochs, "batch_size": batch, "learning_rate": 1e-3, "eval_every": steps,
            "checkpoint_every": max(1, steps // self.scale.points), **run.hyperparameters,
        }  # fmt: skip
        kind = "supervised" if run.data == "preferred" else "dpo"
        return {
            "model": sft, "training_file": api.upload(f"file|{run.data}-{seed}", file), "seed": seed,
            "quantization": "none", "validation_split": 0.02, "adapter": {"r": 16, "alpha": 32},
            "method": {"type": kind, kind: {"hyperparameters": settings}}, "metadata": {"run": run.name},
        }  # fmt: skip

    def _measure(self, api: Api, name: str, model: str, sft: str, seed: int) -> None:
        """Measure the reward and the KL of a model on the held-out prefixes, with errors over prefixes."""
        if f"measured|{name}" in self.state.done:
            return
        evaluation = api.ended(EVALUATIONS, self._sampled(api, name, model, sft, "held_out", SAMPLES, seed=2000 + seed))
        items = api.items(evaluation)
        reward = _mean_over_prompts([(item["prompt_number"], _positive(item["reward"])) for item in items])
        metrics, samples = evaluation["metrics"], sorted(items, key=lambda item: (item["row"], item["sample"]))[:3]
        measured = {
            "reward": reward[0], "reward_error": reward[1], "kl": metrics["kl"], "kl_error": metrics.get("kl/error"),
            "tokens": metrics["tokens"], "ended": metrics["ended"],
            "samples": [item["prompt"] + item["text"] for item in samples],
        }  # fmt: skip
        self.state.keep(f"measured|{name}", measured)
        console.print(f"{name.replace('|', ' ')}: reward {reward[0]:.3f}, KL {metrics['kl']:.2f}", highlight=False)

    def _best_of(self, api: Api, sft: str) -> None:
        """Measure best of N of the SFT model. Its KL is at most log N − (N − 1)/N (Beirami et al. 2024)."""
        if "best-of" in self.state.done:
            return
        evaluation = api.ended(EVALUATIONS, self._sampled(api, "best-of", sft, sft, "held_out", BEST_OF, seed=7))
        by_prompt: dict[int, list[float]] = {}
        for item in api.items(evaluation):
            by_prompt.setdefault(item["row"], []).append(_positive(item["reward"]))
        points = []
        for n in (2, 4, 8, 16, 32, 64):
            best = [
                (row, max(values[first : first + n]))
                for row, values in by_prompt.items() for first in range(0, BEST_OF, n)
            ]  # fmt: skip
            reward = _mean_over_prompts(best)
            points.append({"n": n, "reward": reward[0], "reward_error": reward[1], "kl": math.log(n) - (n - 1) / n})
        self.state.keep("best-of", points)

    @staticmethod
    def _rloo_model(strength: float, seed: int, place: int) -> str:
        return f"rloo-{strength:g}-{seed}/{place}"

    def _rloo(self, strength: float, seed: int) -> None:
        """Train TRL's RLOO from the SFT model with the true reward itself, in a process of its own."""
        target = (self.home / "models" / self._rloo_model(strength, seed, 1)).parent
        if target.exists():
            return
        console.print(f"RLOO with a KL penalty of {strength:g}, seed {seed}", highlight=False)
        partial, began = self.folder / "rloo.partial", time.monotonic()
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "bench.rloo", self.folder, partial, strength, seed]
        with (self.folder / "rloo.log").open("ab") as log:
            numbers = [self.scale.rloo_steps, self.scale.points]
            subprocess.run([*map(str, [*command, *numbers])], check=True, stdout=log, stderr=log)
        partial.rename(target)
        self.state.keep(f"rloo-seconds|{strength:g}|{seed}", time.monotonic() - began)

    # -- results ---------------------------------------------------------------------------------------------------

    def _results(self) -> JsonObject:
        done, grouped = self.state.done, dict[tuple[str, str, str], list[JsonObject]]()
        for name, measured in done.items():
            if name.startswith("measured|"):
                _, method, setting, _seed, place = name.split("|")
                grouped.setdefault((method, setting, place), []).append(measured)
        points = []
        for (method, setting, place), measurements in grouped.items():
            point: JsonObject = {"method": method, "setting": setting, "at": place, "seeds": len(measurements)}
            for axis in ("reward", "kl"):
                values = [measured[axis] for measured in measurements]
                # All seeds have the same prompts, so the error over prompts is not divided by the number of seeds. One
                # seed alone shows no error between seeds.
                within = statistics.mean(measured[f"{axis}_error"] or 0.0 for measured in measurements)
                between = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
                point |= {axis: statistics.mean(values), f"{axis}_error": math.hypot(within, between)}
            for name in ("tokens", "ended"):
                point[name] = statistics.mean(measured[name] for measured in measurements)
            point["samples"] = measurements[0]["samples"]
            points.append(point)
        for best_of in done["best-of"]:
            points.append({"method": "Best of N", "setting": f"N={best_of['n']}", "at": "final", "seeds": 1, **best_of})
        undominated = set(pareto([(point["kl"], point["reward"]) for point in points]))
        for number, point in enumerate(points):
            point["pareto"] = number in undominated
        cost = {name.removeprefix("job-object|"): value for name, value in done.items() if "job-object|" in name}
        seconds = {name.removeprefix("rloo-seconds|"): value for name, value in done.items() if "rloo-seconds" in name}
        return {
            "machine": describe_machine(), "scale": vars(self.scale), "classifier": done["classifier"],
            "points": points,
            "lists_less_pairs": [
                row | {"epochs": 3 if suffix else 1} for suffix in ("", THRICE)
                for row in paired(done, f"Plackett–Luce{suffix}", f"DPO{suffix}", self.seeds)
            ],
            "trainings": cost, "rloo_seconds": seconds,
        }  # fmt: skip


def _positive(logit: float) -> float:
    """P(positive), the true reward."""
    return 1 / (1 + math.exp(-logit))


def _mean_over_prompts(values: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(mean, standard error) of (prompt, value) pairs. Values of one prompt are not independent."""
    groups: dict[int, list[float]] = {}
    for prompt, value in values:
        groups.setdefault(prompt, []).append(value)
    means = [statistics.mean(group) for group in groups.values()]
    return statistics.mean(value for _, value in values), statistics.stdev(means) / math.sqrt(len(means))


def frontier(points: Sequence[JsonObject], method: str) -> list[JsonObject]:
    """The Pareto set of a method's points, checkpoints among them, from the SFT model on."""
    own = [
        point for point in points if point["method"] == method or (point["method"], point["setting"]) == (START, "SFT")
    ]
    return [own[k] for k in pareto([(point["kl"], point["reward"]) for point in own])]


def reward_at(line: Sequence[JsonObject], kl: float) -> tuple[float, float] | None:
    """(reward, its error) at `kl` on the straight lines through a frontier; None beyond its end, or in a wide gap.

    The error is the larger one of the line's two ends. An end's KL error counts through the slope of the line.
    """
    for left, right in pairwise(line):
        if left["kl"] <= kl <= right["kl"] <= left["kl"] + MAX_DRAWN_KL:
            slope = (right["reward"] - left["reward"]) / (right["kl"] - left["kl"])
            errors = [math.hypot(end["reward_error"], slope * (end.get("kl_error") or 0.0)) for end in (left, right)]
            return left["reward"] + slope * (kl - left["kl"]), max(errors)
    return None


def paired(done: JsonObject, first: str, second: str, seeds: Sequence[int]) -> list[JsonObject]:
    """Reward and KL of the method `first` minus those of `second`, at the end of their runs.

    Compared are runs with the same β, seed and prompts. Errors are over seeds.
    """
    rows = []
    for setting in (f"β={beta:g}" for beta in BETAS):
        names = [[f"measured|{method}|{setting}|{seed}|final" for method in (first, second)] for seed in seeds]
        ends = [(done[a], done[b]) for a, b in names if a in done and b in done]
        if not ends:
            continue
        row: JsonObject = {"setting": setting, "seeds": len(ends)}
        for axis in ("reward", "kl"):
            differences = [a[axis] - b[axis] for a, b in ends]
            error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
            row |= {axis: statistics.mean(differences), f"{axis}_error": error}
        rows.append(row)
    return rows


def table(results: JsonObject) -> str:
    """The runs at their end, as Markdown."""
    lines = ["| run | seeds | reward | KL to SFT, nats | tokens | in the Pareto set |", "|---|---:|---:|---:|---:|---|"]
    for point in results["points"]:
        if point["at"] == "final":
            kl_error = f" ± {point['kl_error']:.2f}" if point.get("kl_error") else ""
            tokens = f"{point['tokens']:.0f}" if "tokens" in point else ""
            lines.append(
                f"| {point['method']} {point['setting']} | {point['seeds']} | {point['reward']:.3f} ± "
                f"{point['reward_error']:.3f} | {point['kl']:.2f}{kl_error} | {tokens} | "
                f"{'yes' if point['pareto'] else ''} |"
            )
    return "\n".join(lines)


def frontiers(results: JsonObject) -> str:
    """The reward of each method's frontier at the same KLs, as Markdown."""
    points = results["points"]
    lines = [
        f"| frontier | seeds | points | {' | '.join(f'{kl:g} nats' for kl in KLS)} | ends at |",
        "|---|" + "---:|" * (len(KLS) + 3),
    ]
    for method in dict.fromkeys(point["method"] for point in points if point["method"] != START):
        line, own = frontier(points, method), [point for point in points if point["method"] == method]
        rewards = [reward_at(line, kl) for kl in KLS]
        cells = ["" if reward is None else f"{reward[0]:.3f} ± {reward[1]:.3f}" for reward in rewards]
        seeds, end = min(point["seeds"] for point in own), line[-1]
        row = [method, seeds, len(own), *cells, f"{end['reward']:.3f} at {end['kl']:.2f}"]
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def lists_beside_pairs(results: JsonObject) -> str:
    """Plackett–Luce minus DPO on all pairs, at equal compute, as Markdown."""
    lines = ["| Plackett–Luce minus DPO | epochs | seeds | reward | KL, nats |", "|---|---:|---:|---:|---:|"]
    for row in results["lists_less_pairs"]:
        cells = [
            f"{row[axis]:+.3f}" + (f" ± {error:.3f}" if (error := row[f"{axis}_error"]) is not None else "")
            for axis in ("reward", "kl")
        ]
        lines.append(f"| {row['setting']} | {row['epochs']} | {row['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_points(results: JsonObject) -> list[ParetoPoint]:
    """All points for the picture, those of checkpoints included."""
    return [
        ParetoPoint(
            f"{point['setting']} {point['at']}".strip(), point["method"].removesuffix(THRICE), point["kl"],
            point["reward"], point.get("kl_error"), point["reward_error"],
        )
        for point in results["points"]
    ]  # fmt: skip


def report(results: JsonObject, folder: Path | None) -> None:
    """Print the results and write them to `folder`, or to their places in the repository."""
    print(table(results), frontiers(results), lists_beside_pairs(results), sep="\n\n")
    accuracy, minutes = results["classifier"]["accuracy"], results["seconds"] / 60
    print(f"\n{minutes:.0f} minutes; the classifier is right in {accuracy:.1%} of reviews it has not seen\n")
    place, picture = (RESULT, PICTURE) if folder is None else (folder / RESULT.name, folder / PICTURE.name)
    place.write_text(json.dumps(results, indent=1, ensure_ascii=False))
    place.with_suffix(".csv").write_text(as_csv(plot_points(results)))
    labels = "KL(π ‖ SFT), nats a completion", "P(positive)", "Reward against KL, held-out prefixes"
    picture.write_text(svg([point for point in plot_points(results) if point.x <= MAX_DRAWN_KL], *labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench/.sentiment"), help="where finished steps are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rloo-seeds", type=int, default=1, help="the number of seeds that RLOO runs too")
    parser.add_argument("--quick", action="store_true", help="a few minutes of it, as a test")
    arguments = parser.parse_args()
    shared = Path(os.environ.get("DPO_SHARED", "../shared"))
    if not (shared / "data" / "sentiment").exists():
        parser.exit(2, f"The reviews are not at {shared}/data/sentiment: set DPO_SHARED.\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the service ends with us
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    scale = QUICK if arguments.quick else Scale()
    experiment = Experiment(folder, shared, scale, range(arguments.seeds), arguments.rloo_seeds)
    before = float(experiment.state.done.get("seconds", 0.0))
    try:
        for results in experiment.run():
            results["seconds"] = before + time.monotonic() - began
            report(results, folder if arguments.quick else None)
    finally:
        experiment.state.keep("seconds", before + time.monotonic() - began)


if __name__ == "__main__":
    main()
