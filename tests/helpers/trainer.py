"""Work folders of the trainer, and runs over them."""

import atexit
import csv
import io
import json
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from app.spec.job import JobSpec
from tests.helpers.tiny_model import CORPUS
from worker.model_files import point_to
from worker.processes import ForkServer, answer_cache
from worker.trainer.cache import Cache
from worker.trainer.data import Response, Row
from worker.trainer.events import Events
from worker.trainer.loading import load_policy
from worker.trainer.loop import train
from worker.trainer.model import Base, Policy
from worker.trainer.packing import Pack
from worker.trainer.ranks import Ranks
from worker.trainer.run import TrainingRun

Event = dict[str, Any]
Record = dict[str, Any]
REPOSITORY = Path(__file__).parents[2]
BASE_NAME = "tiny/random-model"
TIME_DEPENDENT = frozenset({"tokens_per_second", "peak_memory_bytes", "mfu"})
WORDS = sorted({word for text in CORPUS for word in text.replace(",", " ").replace(".", " ").split()})


def make_pairs(count: int, seed: int = 0) -> list[Record]:
    """Preference records of many lengths. No token merges over the end of a prompt."""
    source = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(source.choice(WORDS) for _ in range(source.randint(least, most)))

    return [
        {
            "prompt": f"{number}. {words(2, 12)}?",
            "chosen": " " + words(1, 10) + ".",
            "rejected": " " + words(1, 10) + "!",
        }
        for number in range(count)
    ]


def make_row(line: int, prompt: int, *responses: int) -> Row:
    """A row of random tokens, given its lengths; the first token of the first response is not scored."""
    generator = torch.Generator().manual_seed(line)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, 300, (length,), generator=generator).tolist())

    sampled = tuple(
        Response(ids(length), tuple(k > 0 or j > 0 for j in range(length))) for k, length in enumerate(responses)
    )
    return Row(line, ids(prompt), sampled)


ROWS = [make_row(1, 12, 5, 9), make_row(2, 3, 7, 2), make_row(3, 20, 4, 6)]


def write_records(path: Path, records: Sequence[Record]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_work_folder(
    folder: Path, model: Path, spec: dict[str, Any], ranks: int = 1, **files: Sequence[Record]
) -> Path:
    """Lay out `folder` for the trainer. `files` become `{name}.jsonl`; `spec` names them so.

    `ranks` is the number of processes, of one thread each, in which the trainer runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    point_to(folder / "base", model)
    body = {"model": BASE_NAME, "training_file": "train.jsonl", **spec}
    (folder / "spec.json").write_text(json.dumps(body))
    public = JobSpec.model_validate(body).resolved().model_dump(mode="json")
    devices = {"device": "cpu", "ranks": ranks, "threads": 1}
    run = {"base_model": BASE_NAME, "revision": None, "version": "v1", "spec": public, **devices}
    (folder / "run.json").write_text(json.dumps(run))
    for name, records in files.items():
        write_records(folder / f"{name}.jsonl", records)
    return folder


def sft_method(**hyperparameters: object) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def dpo_method(**hyperparameters: object) -> dict[str, Any]:
    return {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}


def make_run(
    folder: Path, stream: io.StringIO | None = None, cache: Path | None = None, ranks: Ranks | None = None
) -> TrainingRun:
    events = Events(stream or io.StringIO())
    return TrainingRun.of(folder, events, threading.Event(), None if cache is None else Cache(cache, events), ranks)


def run_in_process(folder: Path) -> list[Event]:
    """Run the trainer over `folder` in this process. Its errors come through."""
    stream = io.StringIO()
    train(make_run(folder, stream))
    return parse(stream)


def parse(stream: io.StringIO) -> list[Event]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@cache
def fork_server() -> ForkServer:
    """The fork server of this process: torch is loaded once for all trainers of the tests."""
    server = ForkServer()
    atexit.register(server.close)
    return server


class TrainerProcess:
    """A trainer in a process of its own, whose standard input stays open until it is closed or the block ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        self._trainer = fork_server().start(self._folder)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._trainer.kill()

    @property
    def pid(self) -> int:
        return self._trainer.pid

    def events(self) -> Iterator[Event]:
        """The events as they come, until the process closes its end. Every cache request is answered with a miss."""
        for line in self._trainer.stdout:
            event = json.loads(line)
            if event["kind"] == "wanted" and not self._trainer.stdin.closed:
                answer_cache(self._trainer.stdin, event["key"])
            yield event

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: int) -> None:
        self._trainer.send_signal(number)

    def close_stdin(self) -> None:
        self._trainer.stdin.close()

    def status(self) -> int:
        return self._trainer.wait()

    def log(self) -> str:
        return (self._folder / "trainer.log").read_text()


def run_process(folder: Path) -> tuple[int, list[Event]]:
    """Run the trainer over `folder` to its end: (exit status, events)."""
    with TrainerProcess(folder) as process:
        events = list(process.events())
        return process.status(), events


def of_kind(events: Sequence[Event], kind: str) -> list[Event]:
    return [event for event in events if event["kind"] == kind]


def training_metrics(events: Sequence[Event], name: str, stage: str = "sft") -> list[float]:
    """The values of the metric `name` over the steps of `stage`."""
    rows = [event["metrics"] for event in of_kind(events, "metrics") if event["stage"] == stage]
    return [metrics[name] for metrics in rows if name in metrics]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def load(model: Path, *, stream: io.StringIO | None = None, **fields: Any) -> Policy:
    """The policy of a job on `model`: by default a LoRA adapter of rank 4 on an unquantised base."""
    values = {"adapter": {"r": 4}, "quantization": "none", "seed": 1, **fields}
    spec = JobSpec.model_validate({"model": BASE_NAME, "training_file": "train.jsonl", **values}).resolved()
    return load_policy(spec, Base(BASE_NAME, None, None, model), None, Events(stream or io.StringIO()))


def disturb(policy: Policy, scale: float = 0.1, seed: int = 3) -> Policy:
    """Add noise to the trainable parameters. Without it the gradient of a fresh adapter's A is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(scale * noise.to(parameter.dtype))
    return policy


def plain_logps(policy: Policy, row: Row) -> Tensor:
    """Summed log-probs of each response of `row`, from the model's own forward pass over each whole text."""
    with policy.own_attention_in_use():
        return torch.stack([_plain_logp(policy, row, response) for response in row.responses])


def _plain_logp(policy: Policy, row: Row, response: Response) -> Tensor:
    ids = torch.tensor([row.prompt + response.ids])
    logps = policy.causal(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    first = len(row.prompt)
    positions = [first + j for j, scored in enumerate(response.scored) if scored and first + j > 0]
    return sum((logps[t - 1, ids[0, t]] for t in positions), torch.zeros((), dtype=logps.dtype))


def pack_of(policy: Policy, rows: Sequence[Row], numbers: Sequence[int], *, merge: bool = True) -> Pack:
    """All the rows `numbers` in one pack, as `policy` packs."""
    packing = replace(policy.packing, budget=1_000_000, segment_tokens=1_000_000, merge=merge)
    (pack,) = packing.packs(rows, numbers)
    return pack


def gradients(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    """∂ loss for every trainable parameter; zero if the loss does not depend on it."""
    parameters = policy.trainable()
    values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, values, strict=True))
