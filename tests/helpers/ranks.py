"""Ranks in the threads of one process, and steps and trainings on them."""

import hashlib
import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from app.spec.hyperparameters import DPOHyperparameters, SupervisedHyperparameters
from tests.helpers.hardware import choose
from tests.helpers.trainer import (
    TIME_DEPENDENT,
    Event,
    dpo_method,
    make_pairs,
    make_row,
    make_run,
    make_work_folder,
    of_kind,
    parse,
)
from worker.trainer import loading, loop
from worker.trainer.arrays import Shelf
from worker.trainer.averages import Averages
from worker.trainer.data import Row
from worker.trainer.dataset import Rows
from worker.trainer.launcher import Launcher
from worker.trainer.loading import load_policy
from worker.trainer.methods.method import Method
from worker.trainer.methods.mismatches import with_mismatches
from worker.trainer.methods.preference import Preference
from worker.trainer.methods.supervised import Supervised
from worker.trainer.model import Policy
from worker.trainer.naming import meta_model
from worker.trainer.ranks import Ranks
from worker.trainer.reference import References, compute

Value = TypeVar("Value")
PATIENCE = 60.0
"""Seconds after which a rank that waits for another one fails its test."""


@dataclass
class Meeting:
    """The place where `size` threads exchange what they have."""

    size: int
    barrier: threading.Barrier = field(init=False)
    values: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier, self.values = threading.Barrier(self.size, timeout=PATIENCE), [None] * self.size


class ThreadRanks(Ranks):
    """A rank in a thread."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, meeting.size, meeting
        self.local_rank = rank

    def gather(self, value: Value) -> list[Value]:
        self._meeting.values[self.rank] = value
        self._meeting.barrier.wait()
        values = deepcopy(self._meeting.values)  # as if it had come from another process
        self._meeting.barrier.wait()
        return values

    def swap(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Callable[[], list[Tensor]]:
        received = [parts_of_rank[self.rank] for parts_of_rank in self.gather([part.clone() for part in parts])]
        assert [part.numel() for part in received] == list(sizes)
        return lambda: received

    def collect(self, whole: Tensor, part: Tensor) -> Callable[[], None]:
        parts = self.gather(part.clone())
        return lambda: whole.copy_(torch.cat(parts))  # type: ignore[return-value]

    def copy_from(self, rank: int, tensor: Tensor) -> None:
        tensor.copy_(self.gather(tensor.clone())[rank])


LOADING = threading.RLock()
"""Threads load models by turns: they share torch's generator, and transformers patches functions of all threads."""


def one_at_a_time(load: Callable[..., Value]) -> Callable[..., Value]:
    """`load`, which no two threads call at a time."""

    def load_alone(*arguments: Any, **options: Any) -> Value:
        with LOADING:
            return load(*arguments, **options)

    return load_alone


def on_ranks(size: int, work: Callable[[ThreadRanks], Value]) -> list[Value]:
    """The results of `work` on each of `size` ranks. If one fails, all fail."""
    meeting = Meeting(size)

    def run(rank: int) -> Value:
        try:
            return work(ThreadRanks(rank, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return [future.result() for future in futures]


def train_on_ranks(folder: Path, size: int, budget: int) -> list[Event]:
    """Run the trainer over `folder` on `size` ranks with packs of `budget` tokens. Returns the first one's events."""
    streams = [io.StringIO() for _ in range(size)]

    def train(ranks: ThreadRanks) -> None:
        run = make_run(folder, streams[ranks.rank], ranks=ranks)
        with torch.autograd.set_multithreading_enabled(False):
            loop.train(run)

    with pytest.MonkeyPatch.context() as patch:
        choose(patch, pack_tokens=budget)
        patch.setattr(loop, "load_policy", one_at_a_time(load_policy))
        patch.setattr(loading, "meta_model", one_at_a_time(meta_model))
        on_ranks(size, train)
    return parse(streams[0])


# -- a step ----------------------------------------------------------------------------------------------------------


def rows_for(loss: str, lengths: list[tuple[int, list[int]]]) -> Rows:
    """Rows of these lengths. Those with equally long prompts share them."""
    rows = list[Row]()
    for line, (prompt, responses) in enumerate(lengths):
        row = replace(make_row(line, prompt, *responses), prompt=make_row(prompt, prompt, 1).prompt)
        keep = {"plackett_luce": len(responses), "nll": 1, "kto": 1}.get(loss, 2)
        scored = [replace(response, scored=(True,) * len(response.ids)) for response in row.responses]
        rows.append(replace(row, responses=tuple(scored[:keep]), desirable=line % 3 > 0))
    return with_mismatches(Rows.of(rows), 64, Shelf()) if loss == "kto" else Rows.of(rows)


def method_for(loss: str, launcher: Launcher, rows: Rows) -> Method:
    if loss == "nll":
        return Supervised(launcher, SupervisedHyperparameters().resolved(full=False), rows, Rows.of([]))
    return Preference(launcher, DPOHyperparameters(loss=loss).resolved(full=False), rows, Rows.of([]))


def gradient_on(
    ranks: ThreadRanks, policy: Policy, loss: str, rows: Rows, budget: int, virtual_ranks: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(the gradients that this rank owns, the metrics) of a step over all rows."""
    policy.packing = replace(policy.packing, budget=budget, segment_tokens=40)
    launcher = Launcher(policy, ranks, virtual_ranks=virtual_ranks)
    method, averages = method_for(loss, launcher, rows), Averages()
    method.begin(lambda tail_weight: references_of(launcher, rows))
    method.gradient(list(range(len(rows))), averages)
    averages.add("grad_norm", launcher.owned.clip(1.0))
    names = {parameter: name for name, parameter in policy.trainable().items()}
    gradients = {names[parameter]: parameter.grad for parameter in launcher.owned.own if parameter.grad is not None}
    return gradients, averages.means()


def references_of(launcher: Launcher, rows: Rows) -> References:
    return References(compute(launcher, rows), compute(launcher, rows[:0]))


def step_on(size: int, *arguments: Any, models: list[Policy]) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The gradients of all ranks together, and the metrics of each."""
    results = on_ranks(size, lambda ranks: gradient_on(ranks, models[ranks.rank], *arguments))
    return {name: value for part, _ in results for name, value in part.items()}, [metrics for _, metrics in results]


# -- trainings -------------------------------------------------------------------------------------------------------

PAIRS = make_pairs(150)
STEPS = {"max_steps": 2, "batch_size": 60, "eval_every": 1, "checkpoint_every": 1}
COMMON = {"adapter": {"r": 4}, "quantization": "nf4", "seed": 1, "validation_split": 0.2}
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair["chosen" if k % 2 else "rejected"], "label": bool(k % 2)}
    for k, pair in enumerate(PAIRS)
]
RANKED = [
    {
        "prompt": pair["prompt"],
        "completions": [pair["chosen"], pair["rejected"], pair["chosen"] + " more."][: 2 + k % 2],
    }
    for k, pair in enumerate(PAIRS)
]
TRAININGS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "SFT, then DPO": ({"sft": {"hyperparameters": STEPS}, "method": dpo_method(**STEPS)}, PAIRS),
    "KTO": ({"method": dpo_method(loss="kto", **STEPS)}, LABELLED),
    "AOT": ({"method": dpo_method(loss="aot", **STEPS)}, PAIRS),
    "Plackett-Luce": ({"method": dpo_method(loss="plackett_luce", **STEPS)}, RANKED),
    "reward model": ({"method": dpo_method(loss="reward_model", **STEPS)}, PAIRS),
    "DoRA": ({"method": dpo_method(**STEPS), "adapter": {"r": 4, "use_dora": True}, "quantization": "none"}, PAIRS),
    "TR-DPO": ({"method": dpo_method(sync_reference={"alpha": 0.5, "steps": 1}, **STEPS)}, PAIRS),
}


def work_folder(folder: Path, model: Path, name: str, ranks: int = 1, **fields: Any) -> Path:
    """The work folder of the training `name`, with other `fields` of its spec."""
    spec, records = TRAININGS[name]
    return make_work_folder(folder, model, {**COMMON, **spec, **fields}, ranks, train=records)


def outcome(folder: Path, events: list[Event]) -> tuple[str, list[dict[str, float]]]:
    """(the hash of the trained weights, the metrics of all steps)."""
    (weights,) = (folder / "output").glob("*.safetensors")
    metrics = [
        {name: value for name, value in event["metrics"].items() if name not in TIME_DEPENDENT}
        for event in of_kind(events, "metrics")
    ]
    return hashlib.sha256(weights.read_bytes()).hexdigest(), metrics
