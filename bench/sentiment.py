"""`python -m bench.sentiment`: the controlled sentiment experiment of the DPO paper (Rafailov et al. 2023, Sec. 6.1).

The true reward is known: a classifier of reviews. A small language model of IMDb reviews is fine-tuned on reviews
(SFT), four completions of each prefix are drawn from it and make six pairs, and each method is trained on those from
the SFT model: DPO, IPO, unlikelihood, Preferred-FT, Plackett–Luce; best of N needs no training. TRL's RLOO is the
reinforcement learning from outside, with the true reward itself; TRL ships no PPO any more. All but RLOO runs through
this service's own API, and everything is measured by its evaluations: the mean true reward of completions of held-out
prefixes, and the sequence KL to the SFT model.

What is done is in `--folder`: the same command goes on where it was stopped.
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
from typing import Any
from urllib.parse import quote

import httpx2
from rich.console import Console
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from app.sweeps.frontier import ParetoPoint, as_csv, pareto, svg
from bench.machine import describe_machine
from tests.helpers.servers import free_port, wait_until
from worker.classifier import export

RESULT = Path(__file__).parent / "results" / "sentiment.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "sentiment.svg"
BASE = "imdb-llama-2.5m"
BETAS, ALPHAS, STRENGTHS = (0.05, 0.1, 1.0, 5.0), (0.05, 0.1, 0.5, 1.0), (0.01, 0.03, 0.1, 0.3)
SAMPLES, MAX_TOKENS, BEST_OF = 4, 48, 64
REVIEW_WORDS = 30
"""Of each review so many words are learned, so that most completions end by themselves within `MAX_TOKENS`: of those
that are cut, the methods learn ends that nobody wrote."""
MAX_DRAWN_KL = 20.0
"""Nats that the picture shows; what is beyond is in the tables."""
console = Console()


@dataclass(frozen=True)
class Scale:
    """How much of everything: the experiment, or a few minutes of it to see that it runs."""

    reviews: int = 6000
    prompts: int = 600
    held_out: int = 150
    batch_size: int = 32
    rloo_steps: int = 40
    """As many completions, about, as the preferences are made of: 64 a step."""
    points: int = 2
    """Places at which a run is evaluated, its end among them."""


QUICK = Scale(reviews=200, prompts=24, held_out=12, batch_size=16, rloo_steps=2, points=1)
KLS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Nats at which frontiers are compared."""
THRICE = ", 3 epochs"
START = "No preferences"
"""What the base and the SFT model are called among the methods."""


class State:
    """What is done, by name, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def keep(self, name: str, value: Any) -> None:
        self.done[name] = value
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.done))
        partial.replace(self.path)


class Api:
    """The service over HTTP. What was asked for under a name is not asked for again."""

    def __init__(self, url: str, key: str, state: State) -> None:
        self.state = state
        self.http = httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120)

    def upload(self, name: str, path: Path, purpose: str = "fine-tune") -> str:
        if name not in self.state.done:
            with path.open("rb") as file:
                answer = self.http.post("/files", files={"file": (path.name, file)}, data={"purpose": purpose})
            self.state.keep(name, _ok(answer)["id"])
        return str(self.state.done[name])

    def start(self, name: str, path: str, body: dict[str, Any]) -> str:
        """The id of the job or evaluation `name`, which waits or runs from now on."""
        if name not in self.state.done:
            key = sha256(f"{name} {json.dumps(body, sort_keys=True)}".encode()).hexdigest()
            self.state.keep(name, _ok(self.http.post(path, json=body, headers={"Idempotency-Key": key}))["id"])
        return str(self.state.done[name])

    def ended(self, path: str, job_id: str) -> dict[str, Any]:
        """A job or evaluation, when it has succeeded."""
        while True:
            found = _ok(self.http.get(f"{path}/{job_id}"))
            if found["status"] in ("failed", "cancelled"):
                raise RuntimeError(f"{job_id} {found['status']}: {found['error']}")
            if found["status"] == "succeeded":
                return found
            time.sleep(0.5)

    def items(self, evaluation: dict[str, Any]) -> list[dict[str, Any]]:
        """What an evaluation was made of: a completion a line."""
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


def _ok(answer: httpx2.Response) -> dict[str, Any]:
    if answer.status_code >= 400:
        raise RuntimeError(f"{answer.request.url}: {answer.text}")
    found: dict[str, Any] = answer.json()
    return found


JOBS, EVALUATIONS = "/fine_tuning/jobs", "/evaluations"


@contextmanager
def service(home: Path, state: State) -> Iterator[Api]:
    """This repository's service on its embedded default, with `home`/models as its base models."""
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


def reviews(path: Path) -> Iterator[dict[str, Any]]:
    """Reviews with their line breaks, each once."""
    seen = set[str]()
    with gzip.open(path, "rt") as file:
        for line in file:
            found = json.loads(line)
            text = found["text"].replace("<br /><br />", "\n\n").replace("<br />", "\n")
            if text not in seen:
                seen.add(text)
                yield {"text": text, "label": found.get("label")}


def make_classifier(shared: Path, folder: Path) -> dict[str, float]:
    """The true reward: TF-IDF of words and pairs of words, then logistic regression, as the service reads it.

    Trained on half of the labelled reviews, tested on the other half.
    """
    labelled = list(reviews(shared / "imdb-train.jsonl.gz"))
    random.Random(0).shuffle(labelled)
    half = len(labelled) // 2
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=5, max_features=100_000, sublinear_tf=True)
    train, test = labelled[:half], labelled[half:]
    features = vectorizer.fit_transform([one["text"] for one in train])
    model = LogisticRegression(C=10, max_iter=1000).fit(features, [one["label"] == "pos" for one in train])
    said = model.predict(vectorizer.transform([one["text"] for one in test]))
    right = said == [one["label"] == "pos" for one in test]
    export(folder / "classifier.json", vectorizer, model)
    return {"trained_on": half, "tested_on": len(test), "accuracy": float(right.mean())}


def make_files(shared: Path, folder: Path, scale: Scale) -> None:
    """Reviews for SFT, as prefixes of 4 to 8 words and what follows; prefixes of other reviews, some held out."""
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
    _write(folder / "held_out.jsonl", prompts[scale.prompts :])  # the last one: it says that all are there


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return partial.rename(path)


def make_preferences(items: Sequence[dict[str, Any]], folder: Path, seed: int) -> dict[str, Path]:
    """Of each prefix' four completions six pairs, the ranked list, and the best one, by the true reward."""
    by_row: dict[int, list[dict[str, Any]]] = {}
    for item in items:
        by_row.setdefault(item["row"], []).append(item)
    pairs, ranked, best = [], [], []
    for found in by_row.values():
        order = sorted(found, key=lambda item: -item["reward"])
        for better, worse in combinations(order, 2):
            if better["reward"] > worse["reward"] and better["text"] != worse["text"]:
                sides = {"chosen": better["text"], "rejected": worse["text"]}
                pairs.append({"prompt": better["prompt"], **sides})
                best.append({"prompt": better["prompt"], "completion": better["text"]})
        if len({item["text"] for item in order}) == len(order):
            ranked.append({"prompt": order[0]["prompt"], "responses": [item["text"] for item in order]})
    rows = {"ranked": ranked, "preferred": best, "pairs": pairs}  # the last one says that all are there
    return {name: _write(folder / f"{name}-{seed}.jsonl", found) for name, found in rows.items()}


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A training from the SFT model: its method, what is varied, its data and hyperparameters."""

    method: str
    setting: str
    data: str
    hyperparameters: dict[str, Any]
    epochs: int = 1
    share: float = 1.0
    """Of the batch size that pairs have in one epoch. The engine keeps pairs of one prompt together and computes each
    text once: six pairs cost what a list of four does, and a sixth of the rows makes steps of as many texts."""

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
    """All phases, each of which can be broken off."""

    def __init__(self, folder: Path, shared: Path, scale: Scale, seeds: Sequence[int], rloo_seeds: int) -> None:
        self.folder, self.shared, self.scale, self.seeds = folder, shared, scale, seeds
        self.strengths = {seed: STRENGTHS if number < rloo_seeds else () for number, seed in enumerate(seeds)}
        self.home = folder / "home"
        self.state = State(folder / "state.json")

    def run(self) -> Iterator[dict[str, Any]]:
        """What came out so far, after each seed."""
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
        settings = {"n_epochs": 1, "batch_size": 32, "learning_rate": 2e-4}
        body = {
            "model": BASE, "training_file": api.upload("file|sft", self.folder / "sft.jsonl"), "adapter": "none",
            "seed": 0, "suffix": "sft", "method": {"type": "supervised", "supervised": {"hyperparameters": settings}},
        }  # fmt: skip
        return str(api.ended(JOBS, api.start("job|sft", JOBS, body))["fine_tuned_model"])

    def _sampled(self, api: Api, name: str, candidate: str, baseline: str, file: str, samples: int, seed: int) -> str:
        """The id of an evaluation of completions: their true rewards, and their KL to the baseline."""
        body = {
            "type": "reward_kl", "candidate": {"model": candidate}, "baseline": {"model": baseline}, "seed": seed,
            "data": api.upload(f"file|{file}", self.folder / f"{file}.jsonl", "evals"), "quantization": "none",
            "sampling": {"temperatures": [1.0], "max_tokens": MAX_TOKENS, "samples": samples},
            "judge": {"type": "classifier", "classifier": {
                "file": api.upload("file|classifier", self.folder / "classifier.json", "evals")}},
        }  # fmt: skip
        return api.start(f"evaluation|{name}", EVALUATIONS, body)

    def _train_and_measure(self, api: Api, sft: str, seed: int) -> None:
        drawn = api.ended(
            EVALUATIONS, self._sampled(api, f"draw|{seed}", sft, sft, "prompts", SAMPLES, seed=1000 + seed)
        )  # fmt: skip
        if not (self.folder / f"pairs-{seed}.jsonl").exists():
            make_preferences(api.items(drawn), self.folder, seed)
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
            listed = _ok(api.http.get(f"{JOBS}/{job['id']}/checkpoints", params={"limit": 100}))["data"]
            steps = sorted((int(one["step_number"]), one["fine_tuned_model_checkpoint"]) for one in listed)
            for place, (_, model) in enumerate(steps[: self.scale.points - 1], 1):
                self._measure(api, f"{name}|{self._place(place)}", model, sft, seed)
            self._measure(api, f"{name}|final", job["fine_tuned_model"], sft, seed)

    def _place(self, place: int) -> str:
        return "final" if place == self.scale.points else f"{place}/{self.scale.points}"

    def _body(self, api: Api, run: Run, sft: str, seed: int) -> dict[str, Any]:
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
        """Reward and KL of a model on the held-out prefixes, with errors over prefixes."""
        if f"measured|{name}" in self.state.done:
            return
        found = api.ended(EVALUATIONS, self._sampled(api, name, model, sft, "held_out", SAMPLES, seed=2000 + seed))
        items = api.items(found)
        reward = _mean_over_prompts([(item["prompt_number"], _positive(item["reward"])) for item in items])
        metrics, samples = found["metrics"], sorted(items, key=lambda item: (item["row"], item["sample"]))[:3]
        measured = {
            "reward": reward[0], "reward_error": reward[1], "kl": metrics["kl"], "kl_error": metrics.get("kl/error"),
            "tokens": metrics["tokens"], "ended": metrics["ended"],
            "samples": [item["prompt"] + item["text"] for item in samples],
        }  # fmt: skip
        self.state.keep(f"measured|{name}", measured)
        console.print(f"{name.replace('|', ' ')}: reward {reward[0]:.3f}, KL {metrics['kl']:.2f}", highlight=False)

    def _best_of(self, api: Api, sft: str) -> None:
        """Best of N of the SFT model: its KL is log N − (N − 1)/N at most (Beirami et al. 2024)."""
        if "best-of" in self.state.done:
            return
        found = api.ended(EVALUATIONS, self._sampled(api, "best-of", sft, sft, "held_out", BEST_OF, seed=7))
        by_prompt: dict[int, list[float]] = {}
        for item in api.items(found):
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
        """TRL's RLOO from the SFT model, with the true reward itself, in a process of its own."""
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

    # -- what came out ---------------------------------------------------------------------------------------------

    def _results(self) -> dict[str, Any]:
        done, grouped = self.state.done, dict[tuple[str, str, str], list[dict[str, Any]]]()
        for name, measured in done.items():
            if name.startswith("measured|"):
                _, method, setting, _seed, at = name.split("|")
                grouped.setdefault((method, setting, at), []).append(measured)
        points = []
        for (method, setting, at), found in grouped.items():
            point: dict[str, Any] = {"method": method, "setting": setting, "at": at, "seeds": len(found)}
            for axis in ("reward", "kl"):
                values = [one[axis] for one in found]
                # Prompts are the same for all seeds: their error is not divided by the number of seeds. With one seed
                # nothing is known of the others.
                within = statistics.mean(one[f"{axis}_error"] or 0.0 for one in found)
                between = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
                point |= {axis: statistics.mean(values), f"{axis}_error": math.hypot(within, between)}
            point |= {name: statistics.mean(one[name] for one in found) for name in ("tokens", "ended")}
            point["samples"] = found[0]["samples"]
            points.append(point)
        for one in done["best-of"]:
            points.append({"method": "Best of N", "setting": f"N={one['n']}", "at": "final", "seeds": 1, **one})
        best = set(pareto([(point["kl"], point["reward"]) for point in points]))
        for number, point in enumerate(points):
            point["pareto"] = number in best
        cost = {name.removeprefix("job-object|"): value for name, value in done.items() if "job-object|" in name}
        seconds = {name.removeprefix("rloo-seconds|"): value for name, value in done.items() if "rloo-seconds" in name}
        return {
            "machine": describe_machine(), "scale": vars(self.scale), "classifier": done["classifier"],
            "points": points,
            "lists_less_pairs": [
                row | {"epochs": 3 if more else 1} for more in ("", THRICE)
                for row in paired(done, f"Plackett–Luce{more}", f"DPO{more}", self.seeds)
            ],
            "trainings": cost, "rloo_seconds": seconds,
        }  # fmt: skip


def _positive(logit: float) -> float:
    """P(positive), the true reward."""
    return 1 / (1 + math.exp(-logit))


def _mean_over_prompts(values: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(mean, standard error) where values of one prompt are not independent."""
    groups: dict[int, list[float]] = {}
    for prompt, value in values:
        groups.setdefault(prompt, []).append(value)
    means = [statistics.mean(group) for group in groups.values()]
    return statistics.mean(value for _, value in values), statistics.stdev(means) / math.sqrt(len(means))


def frontier(points: Sequence[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """The Pareto set of a method's points, checkpoints among them, from the SFT model on."""
    own = [one for one in points if one["method"] == method or (one["method"], one["setting"]) == (START, "SFT")]
    return [own[k] for k in pareto([(one["kl"], one["reward"]) for one in own])]


def reward_at(line: Sequence[dict[str, Any]], kl: float) -> tuple[float, float] | None:
    """(reward, its error) at `kl` on the straight lines through a frontier; None beyond its end, or in a wide gap.

    The error is the larger one of the two ends, that of their KL in it by the line's slope.
    """
    for left, right in pairwise(line):
        if left["kl"] <= kl <= right["kl"] <= left["kl"] + MAX_DRAWN_KL:
            slope = (right["reward"] - left["reward"]) / (right["kl"] - left["kl"])
            errors = [math.hypot(one["reward_error"], slope * (one.get("kl_error") or 0.0)) for one in (left, right)]
            return left["reward"] + slope * (kl - left["kl"]), max(errors)
    return None


def paired(done: dict[str, Any], one: str, other: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """How much more reward and KL the method `one` comes to than `other` at its end: same β, same seed, same prompts.

    Errors are over seeds.
    """
    found = []
    for setting in (f"β={beta:g}" for beta in BETAS):
        names = [[f"measured|{method}|{setting}|{seed}|final" for method in (one, other)] for seed in seeds]
        ends = [(done[a], done[b]) for a, b in names if a in done and b in done]
        if not ends:
            continue
        row: dict[str, Any] = {"setting": setting, "seeds": len(ends)}
        for axis in ("reward", "kl"):
            apart = [a[axis] - b[axis] for a, b in ends]
            error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else None
            row |= {axis: statistics.mean(apart), f"{axis}_error": error}
        found.append(row)
    return found


def table(results: dict[str, Any]) -> str:
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


def frontiers(results: dict[str, Any]) -> str:
    """The reward of each method's frontier at the same KLs, as Markdown."""
    points = results["points"]
    lines = [
        f"| frontier | seeds | points | {' | '.join(f'{kl:g} nats' for kl in KLS)} | ends at |",
        "|---|" + "---:|" * (len(KLS) + 3),
    ]
    for method in dict.fromkeys(point["method"] for point in points if point["method"] != START):
        line, own = frontier(points, method), [one for one in points if one["method"] == method]
        found = [reward_at(line, kl) for kl in KLS]
        cells = ["" if one is None else f"{one[0]:.3f} ± {one[1]:.3f}" for one in found]
        seeds, end = min(one["seeds"] for one in own), line[-1]
        row = [method, seeds, len(own), *cells, f"{end['reward']:.3f} at {end['kl']:.2f}"]
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def lists_beside_pairs(results: dict[str, Any]) -> str:
    """Plackett–Luce less DPO on all pairs, at equal compute, as Markdown."""
    lines = ["| Plackett–Luce less DPO | epochs | seeds | reward | KL, nats |", "|---|---:|---:|---:|---:|"]
    for one in results["lists_less_pairs"]:
        cells = [
            f"{one[axis]:+.3f}" + (f" ± {error:.3f}" if (error := one[f"{axis}_error"]) is not None else "")
            for axis in ("reward", "kl")
        ]
        lines.append(f"| {one['setting']} | {one['epochs']} | {one['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def drawn(results: dict[str, Any]) -> list[ParetoPoint]:
    """All points, those of checkpoints too, as the frontier's picture has them."""
    return [
        ParetoPoint(
            f"{one['setting']} {one['at']}".strip(), one["method"].removesuffix(THRICE), one["kl"], one["reward"],
            one.get("kl_error"), one["reward_error"],
        )
        for one in results["points"]
    ]  # fmt: skip


def report(results: dict[str, Any], folder: Path | None) -> None:
    """Print what came out and write it, to `folder` or to where the repository keeps it."""
    print(table(results), frontiers(results), lists_beside_pairs(results), sep="\n\n")
    accuracy, minutes = results["classifier"]["accuracy"], results["seconds"] / 60
    print(f"\n{minutes:.0f} minutes; the classifier is right in {accuracy:.1%} of reviews it has not seen\n")
    place, picture = (RESULT, PICTURE) if folder is None else (folder / RESULT.name, folder / PICTURE.name)
    place.write_text(json.dumps(results, indent=1, ensure_ascii=False))
    place.with_suffix(".csv").write_text(as_csv(drawn(results)))
    labels = "KL(π ‖ SFT), nats a completion", "P(positive)", "Reward against KL, held-out prefixes"
    picture.write_text(svg([point for point in drawn(results) if point.x <= MAX_DRAWN_KL], *labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench/.sentiment"), help="what is done is there")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rloo-seeds", type=int, default=1, help="of these so many with RLOO, a third of the time")
    parser.add_argument("--quick", action="store_true", help="a little of it, to see that it runs")
    given = parser.parse_args()
    shared = Path(os.environ.get("DPO_SHARED", "../shared"))
    if not (shared / "data" / "sentiment").exists():
        parser.exit(2, f"The reviews are not at {shared}/data/sentiment: set DPO_SHARED.\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the service ends with us
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    experiment = Experiment(folder, shared, QUICK if given.quick else Scale(), range(given.seeds), given.rloo_seeds)
    before = float(experiment.state.done.get("seconds", 0.0))
    try:
        for results in experiment.run():
            results["seconds"] = before + time.monotonic() - began
            report(results, folder if given.quick else None)
    finally:
        experiment.state.keep("seconds", before + time.monotonic() - began)


if __name__ == "__main__":
    main()
