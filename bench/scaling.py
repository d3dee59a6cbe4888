"""`python -m bench.scaling`: what several ranks cost and save, measured on CPUs, and on paper for GPUs.

Measured here, one thread a rank, in turns on the same rows:

- the canonical order: a step as the engine sums it, beside one in which autograd sums each whole pack;
- the distributed path: one rank in a process group, beside one without a group;
- two ranks beside one, and the bytes that they send, counted, beside the formula.

On paper: the efficiency of 8 × H100 and of 2 × 8 × H100 on an 8B model. It follows from the plan of each step, from the
bytes that cross the links, and from the speeds in `PAPER`. No GPU was asked.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from app.spec.hyperparameters import DPOHyperparameters
from app.spec.json_types import JsonObject
from app.spec.resources import VIRTUAL_RANKS
from bench.inputs import HH, ULTRAFEEDBACK, VOCABULARY, Lengths, lengths_of, make_model
from bench.machine import describe_machine
from tests.helpers.servers import free_port
from tests.helpers.trainer import disturb, load
from worker.trainer.averages import Averages
from worker.trainer.data import Response, Row
from worker.trainer.dataset import Rows
from worker.trainer.distributed import DistributedRanks
from worker.trainer.launcher import Launcher, Values, joined
from worker.trainer.methods.method import Totals
from worker.trainer.methods.preference import Preference
from worker.trainer.objectives import losses_of
from worker.trainer.packing import Packing
from worker.trainer.ranks import Ranks
from worker.trainer.reference import References, compute
from worker.trainer.segments import StepPlan

RESULT = Path(__file__).parent / "results" / "scaling.json"
PAIRS, MAX_LENGTH, ROUNDS = 16, 512, 21
FLOAT_BYTES = 4
PAPER = {
    "trained_parameters": 41_943_040,  # LoRA r = 16 on all layers of Llama-3.1-8B
    "tokens_per_second": 11_300.0,  # distinct tokens on one H100: what the engine is expected to reach
    "bytes_per_second_in_a_node": 360e9,  # NVLink 4, 80 % of 450 GB/s in each direction
    "bytes_per_second_between_nodes": 40e9,  # 400 Gb/s for each GPU, 80 % of it
    "seconds_of_small_messages": 0.002,  # five exchanges of a few kB
}
TOKENS_PER_WORD = 1.3


def rows_of(lengths: Sequence[Lengths], max_length: int, scale: float = 1.0) -> Rows:
    """Rows of random tokens with these lengths in words. A prompt or an answer has at most half of `max_length`."""
    generator = random.Random(0)

    def ids(words: int) -> tuple[int, ...]:
        count = max(1, min(int(scale * words), max_length // 2 - 1))
        return tuple(generator.randrange(3, VOCABULARY) for _ in range(count))

    return Rows.of(
        Row(line, ids(prompt), tuple(Response(part, (True,) * len(part)) for part in (ids(chosen), ids(rejected))))
        for line, (prompt, chosen, rejected) in enumerate(lengths)
    )


class CountingRanks(DistributedRanks):
    """Ranks that count the bytes of gradients and parameters that they send."""

    sent = 0

    def swap(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Callable[[], list[Tensor]]:
        self.sent += sum(FLOAT_BYTES * part.numel() for k, part in enumerate(parts) if k != self.rank)
        return super().swap(parts, sizes)

    def copy_from(self, rank: int, tensor: Tensor) -> None:
        self.sent += FLOAT_BYTES * tensor.numel() * (self.size - 1) if rank == self.rank else 0
        super().copy_from(rank, tensor)


class Step:
    """One optimizer step over all rows, without the optimizer."""

    def __init__(self, model: Path, rows: Rows, ranks: Ranks) -> None:
        self.policy, self.rows = disturb(load(model, adapter={"r": 16}, quantization="nf4"), 0.01), rows
        self.launcher = Launcher(self.policy, ranks)
        settings = DPOHyperparameters().resolved(full=False)
        self.method = Preference(self.launcher, settings, rows, rows[:0])
        self.method.references = References(compute(self.launcher, rows), compute(self.launcher, rows[:0]))

    def canonical(self) -> None:
        """As the engine sums it."""
        self.method.gradient(list(range(len(self.rows))), Averages())
        self.launcher.owned.clip(1.0)
        self.launcher.owned.share()

    def by_autograd(self) -> None:
        """The same packs, each summed by autograd, and the same loss and metrics."""
        plan = self.launcher.plan(list(self.method.segments(self.rows, range(len(self.rows)))))
        references = self.method.references
        assert references is not None
        parts, totals = list[Values](), Totals.of(self.rows, range(len(self.rows)))
        for group in self.policy.packing.groups(plan.segments):
            pack = self.policy.packing.build(group)
            values = self.method._scores(pack) | self.method._references(pack, references.train)
            batch = self.method._batch(values, pack.row_of, pack.rows, self.rows, totals)
            (losses_of(batch, self.method.settings).sum() / totals.rows).backward()  # type: ignore[no-untyped-call]
            parts.append({name: tensor.detach() for name, tensor in values.items()})
        self.method._report(joined(parts), plan.rows, self.rows, totals, Averages())
        torch.nn.utils.clip_grad_norm_(list(self.policy.trainable().values()), 1.0)
        for parameter in self.policy.trainable().values():
            parameter.grad = None


def seconds_in_turns(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each of `works` in each round. They take turns, and the first round does not count."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if number:
                taken[name].append(time.perf_counter() - began)
    return taken


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """The median over all rounds of the time of `one` divided by that of `other`, which was measured beside it."""
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def on_rank(rank: int, size: int, port: int, model: str, lengths: list[Lengths], result: str) -> None:
    """Measure a step on a rank of `size`. The first one writes the seconds and the bytes sent by all to `result`."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    ranks = CountingRanks("cpu")
    step = Step(Path(model), rows_of(lengths, MAX_LENGTH), ranks)
    ranks.sent = 0
    works: dict[str, Callable[[], None]] = {"in a group": step.canonical}
    if size == 1:
        alone = Step(Path(model), rows_of(lengths, MAX_LENGTH), Ranks())
        works |= {"alone": alone.canonical, "summed by autograd": alone.by_autograd}
    seconds = seconds_in_turns(works, ROUNDS)
    plan = step.launcher.plan(list(step.method.segments(step.rows, range(len(step.rows)))))
    trained = sum(parameter.numel() for parameter in step.launcher.owned.parameters)
    sent = sum(ranks.gather(ranks.sent)) / (ROUNDS + 1)
    if rank == 0:
        formula = FLOAT_BYTES * trained * (size - 1) * (len(plan.virtual_ranks) / size + 1)
        figures = {"seconds": seconds, "bytes_sent": sent, "bytes_by_formula": formula}
        figures |= {"virtual_ranks": len(plan.virtual_ranks), "segments": len(plan.segments)}
        Path(result).write_text(json.dumps(figures | {"tokens": step.rows.tokens(range(len(step.rows)))}))
    ranks.close()


def measure() -> JsonObject:
    """The figures of one rank and of two."""
    lengths, source = lengths_of(HH, PAIRS, (60, 30, 30))
    measured: JsonObject = {"rows": f"{PAIRS} pairs, {source}"}
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name) / "model", MAX_LENGTH)
        for size in (1, 2):
            result = Path(name) / f"{size}.json"
            arguments = (size, free_port(), str(Path(name) / "model"), lengths, str(result))
            spawn(on_rank, arguments, nprocs=size)  # type: ignore[no-untyped-call]
            measured[f"{size} ranks"] = json.loads(result.read_text())
    one, two = measured["1 ranks"], measured["2 ranks"]
    seconds = one["seconds"]
    measured["canonical_order"] = ratio(seconds, "alone", "summed by autograd")
    measured["distributed_path_at_one_rank"] = ratio(seconds, "in a group", "alone")
    together = two["seconds"]["in a group"]
    measured["speed_of_two_ranks"] = statistics.median(seconds["alone"]) / statistics.median(together)
    return measured


def efficiency(rows: Rows, batch: int, nodes: int, virtual_ranks: int) -> tuple[float, int]:
    """(mean efficiency of steps of `batch` rows on `nodes` × 8 GPUs on paper, mean tokens of a step)."""
    size, packing = 8 * nodes, Packing(8192)
    trained = FLOAT_BYTES * PAPER["trained_parameters"]
    # A round's sums go out while the next one is computed. The last round, and the new parameters, wait for the links.
    local, remote = (8 - 1) / size, (nodes - 1) * 8 / size
    exposed = 2 * trained * max(
        local / PAPER["bytes_per_second_in_a_node"], remote / PAPER["bytes_per_second_between_nodes"]
    ) + PAPER["seconds_of_small_messages"]  # fmt: skip
    shares, tokens = [], []
    for first in range(0, len(rows) - batch + 1, batch):
        plan = StepPlan.of(list(packing.segments(rows, range(first, first + batch))), virtual_ranks)
        loads = [sum(segment.tokens for segment in virtual_rank) for virtual_rank in plan.virtual_ranks]
        by_rank = [sum(loads[v] for v in plan.rounds(rank, size) if v is not None) for rank in range(size)]
        seconds = max(by_rank) / PAPER["tokens_per_second"] + exposed
        shares.append(sum(loads) / PAPER["tokens_per_second"] / size / seconds)
        tokens.append(sum(loads))
    return statistics.mean(shares), int(statistics.mean(tokens))


def on_paper() -> list[JsonObject]:
    """The efficiency by rows, batch size, number of nodes and of virtual ranks."""
    figures = []
    for name, file, medians, limit in (
        ("HH", HH, (60, 30, 30), 1024),
        ("UltraFeedback", ULTRAFEEDBACK, (80, 200, 200), 2048),
    ):
        lengths, source = lengths_of(file, 2048, medians)
        rows = rows_of(lengths, limit, TOKENS_PER_WORD)
        for batch in (32, 64, 128, 256, 512):
            for nodes in (1, 2):
                for virtual_ranks in (VIRTUAL_RANKS, 64):
                    share, tokens = efficiency(rows, batch, nodes, virtual_ranks)
                    figures.append({
                        "rows": name, "source": source, "batch_size": batch, "tokens": tokens, "gpus": 8 * nodes,
                        "virtual_ranks": virtual_ranks, "efficiency": round(share, 3),
                    })  # fmt: skip
    return figures


def show(result: JsonObject, console: Console) -> None:
    """Print the figures as tables."""
    table = Table("measured here", "ratio", "goal")
    table.add_row("canonical order, beside sums by autograd", f"{result['canonical_order']:.3f}", "≤ 1.05")
    table.add_row("process group of one rank", f"{result['distributed_path_at_one_rank']:.3f}", "≤ 1.02")
    table.add_row("speed of two ranks, beside one", f"{result['speed_of_two_ranks']:.2f}", "")
    two = result["2 ranks"]
    table.add_row(
        "bytes sent by two ranks, beside the formula", f"{two['bytes_sent'] / two['bytes_by_formula']:.3f}", "1"
    )
    console.print(table)
    paper = Table("on paper", "batch size", "tokens a step", "GPUs", "virtual ranks", "efficiency")
    for figure in result["paper"]:
        names = ("rows", "batch_size", "tokens", "gpus", "virtual_ranks")
        paper.add_row(*(str(figure[name]) for name in names), f"{figure['efficiency']:.1%}")
    console.print(paper)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    measured: dict[str, Any] = measure()
    result = {"machine": describe_machine(), "assumed": PAPER, **measured, "paper": on_paper()}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    show(result, Console())


if __name__ == "__main__":
    main()
