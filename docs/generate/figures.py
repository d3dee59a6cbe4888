"""The tables of measured figures, from `bench/results/`."""

import json
import statistics
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from app.spec.resources import VIRTUAL_RANKS
from bench.gpu import roofline
from bench.sentiment import frontiers, lists_beside_pairs
from bench.sentiment import table as sentiment_table
from docs.generate.markdown import table
from tests.faults.report import by_fault

RESULTS = Path(__file__).parents[2] / "bench" / "results"


@cache
def result(name: str) -> Any:
    """The figures that a bench has left."""
    return json.loads((RESULTS / f"{name}.json").read_text())


# -- the engine ---------------------------------------------------------------------------------------------------

ENTRANTS = {
    "dpo-service": "this engine",
    "TRL packed": "TRL packed (bfd)",
    "TRL packed, no checkpointing": "TRL packed, nothing recomputed",
}
"""The names of entrants in the table of docs/engine.md, where they differ from those of the results."""


def seconds(task: str, entrant: str) -> float:
    """The median time of an entrant."""
    return float(statistics.median(run["seconds"] for run in result("cpu")[task][entrant]))


def peak_bytes(task: str, entrant: str) -> int:
    """The largest peak of an entrant."""
    return max(int(run["peak_bytes"]) for run in result("cpu")[task][entrant])


def pairs_per_second(entrant: str, epochs: int) -> float:
    """The median throughput of DPO over the pairs of the bench."""
    return pairs() * epochs / seconds(f"dpo, {epochs} epochs", entrant)


def pairs() -> int:
    """The number of pairs of the bench, with which the description of its rows begins."""
    return int(result("cpu")["rows"].split()[0])


def times_as_fast(task: str, entrant: str) -> float:
    """How many times as fast as an entrant this engine is, by medians."""
    return seconds(task, entrant) / seconds(task, "dpo-service")


def _engine(epochs: int) -> str:
    task = f"dpo, {epochs} epochs"
    bounds, rows = result("cpu")[task]["bounds"], []
    for name in ("dpo-service", *bounds):
        times = sorted(run["seconds"] for run in result("cpu")[task][name])
        ours = name == "dpo-service"
        rows.append(
            (
                ENTRANTS.get(name, name),
                f"{pairs_per_second(name, epochs):.2f}",
                f"{pairs() * epochs / times[-1]:.2f} to {pairs() * epochs / times[0]:.2f}",
                f"{peak_bytes(task, name) / 1e6:,.0f} MB",
                "" if ours else f"{times_as_fast(task, name):.1f} × as fast",
                "" if ours else f"{bounds[name]:.1f} ×",
            )
        )
    title = f"DPO, {epochs} epoch{'s' * (epochs > 1)}"
    return table((title, "pairs/s", "spread", "peak memory", "this engine is", "by FLOPs alone"), rows, range(1, 6))


def _engine_sft() -> str:
    task, rows = "sft, 3 epochs", []
    for name, runs in result("cpu")[task].items():
        times = sorted(run["seconds"] for run in runs)
        rows.append(
            (
                ENTRANTS.get(name, name),
                f"{seconds(task, name):.2f}",
                f"{times[0]:.2f} to {times[-1]:.2f}",
                f"{peak_bytes(task, name) / 1e6:,.0f} MB",
                "" if name == "dpo-service" else f"{times_as_fast(task, name):.1f} × as fast",
            )
        )
    return table(("SFT, packed, 3 epochs", "seconds", "spread", "peak memory", "this engine is"), rows, range(1, 5))


def _engine_in_short() -> str:
    names = {
        "dpo-service": "dpo-service",
        "TRL default": "TRL 1.16, default",
        "TRL best options": "TRL 1.16, its best options",
    }
    rows = [
        (title, f"{pairs_per_second(name, 3):.1f}", f"{peak_bytes('dpo, 3 epochs', name) / 1e9:.1f} GB")
        for name, title in names.items()
    ]
    return table(("", "pairs/s", "memory"), rows, (1, 2))


def _scaling() -> str:
    """The costs and the speed of ranks, as measured."""
    measured = result("scaling")
    sent = measured["2 ranks"]["bytes_sent"] / measured["2 ranks"]["bytes_by_formula"]
    rows = [
        ("a step in canonical order, beside one that autograd sums", f"{measured['canonical_order']:.3f} × the time"),
        (
            "one rank in a process group, beside one without",
            f"{measured['distributed_path_at_one_rank']:.3f} × the time",
        ),
        ("two ranks, beside one", f"{measured['speed_of_two_ranks']:.2f} × the speed"),
        ("bytes that two ranks send, beside the formula", f"{sent:.3f}"),
    ]
    return table(("measured", ""), rows, (1,))


def _scaling_on_paper() -> str:
    """The efficiency of many GPUs with the default number of virtual ranks, on paper."""
    figures = [row for row in result("scaling")["paper"] if row["virtual_ranks"] == VIRTUAL_RANKS]
    efficiency = {(row["rows"], row["batch_size"], row["gpus"]): row["efficiency"] for row in figures}
    rows = [
        (
            f"{row['rows']}, {row['batch_size']} pairs",
            f"{row['tokens']:,}",
            *(f"{efficiency[row['rows'], row['batch_size'], gpus]:.0%}" for gpus in (8, 16)),
        )
        for row in figures
        if row["gpus"] == 8
    ]
    return table(("a step", "tokens", "8 GPUs", "2 × 8 GPUs"), rows, (1, 2, 3))


def _roofline() -> str:
    """The parts of a step on an H100, by arithmetic."""
    ways = ("floor", "predicted", "compiled", "in_fp8", "within_reach")
    compiled = dict.fromkeys(("compiled", "in_fp8"), roofline.IDLE_COMPILED_SECONDS)
    idle = {"predicted": roofline.IDLE_SECONDS} | compiled
    rows = [
        (
            part.name,
            f"{part.flops / 1e12:.1f}",
            f"{part.bytes / 1e9:,.0f}",
            f"{part.least_bytes / 1e9:,.0f}",
            *(f"{getattr(part, way) * 1e3:.0f}" for way in ways),
        )
        for part in roofline.PARTS
    ]
    whole = [sum(getattr(part, way) for part in roofline.PARTS) + idle.get(way, 0.0) for way in ways]
    rows += [
        ("waiting for Python", "", "", "", *(f"{idle[way] * 1e3:.0f}" if way in idle else "" for way in ways)),
        ("together", "", "", "", *(f"{seconds * 1e3:.0f}" for seconds in whole)),
        ("tokens/s", "", "", "", *(f"{roofline.TOKENS / seconds:,.0f}" for seconds in whole)),
    ]
    head = (
        "part",
        "TFLOP",
        "GB",
        "GB at least",
        "floor, ms",
        "uncompiled, ms",
        "compiled, ms",
        "FP8, ms",
        "at best, ms",
    )
    return table(head, rows, range(1, 9))


def _activations() -> str:
    """The bytes that a layer keeps for its backward pass."""
    sizes = result("activations")["bytes_per_token_and_layer"]
    rows = [(name, f"{size:,}", f"{roofline.LAYERS * size / 1e6:.2f} MB") for name, size in sizes.items()]
    return table(("layers", "bytes a token and layer", "a token, 32 layers"), rows, (1, 2))


def _sampling() -> str:
    """The speed of sampling on a CPU."""
    found = result("sampling")
    speeds = {name: [found["tokens"] / run for run in runs] for name, runs in found["seconds"].items()}
    rows = [
        (name, f"{statistics.median(runs):,.0f}", f"{min(runs):,.0f} to {max(runs):,.0f}")
        for name, runs in speeds.items()
    ]
    return table(("", "tokens/s", "slowest to fastest run"), rows, (1, 2))


def _reinforcement() -> str:
    """The speed of a step of reinforcement on a CPU."""
    found = result("reinforcement")
    rows = [
        (name, f"{statistics.median(steps):.1f}", f"{min(steps):.1f} to {max(steps):.1f}",
         f"{found['answers'] / statistics.median(steps):.1f}")
        for name, steps in found["seconds"].items()
    ]  # fmt: skip
    return table(("", "seconds a step", "fastest to slowest step", "answers/s"), rows, (1, 2, 3))


def _rows() -> str:
    """The memory of a rank by the size of the file."""
    rows = [
        (
            f"{run['megabytes']:,} MB",
            f"{run['rows']:,}",
            str(run["ranks"]),
            f"{max(run['peak_bytes']) / 1e6:.0f} MB",
            f"{run['above'] / 1e6:.0f} MB",
        )
        for run in result("rows")["runs"]
    ]
    return table(("file", "rows", "ranks", "peak of a rank", "above the smallest file"), rows, range(5))


def _checks() -> str:
    """The memory of the check of a file by its size."""
    rows = [
        (f"{check['megabytes']:,} MB", f"{check['peak_bytes'] / 1e6:.0f} MB", f"{check['seconds']:.0f}")
        for check in result("rows")["checks"]
    ]
    return table(("file", "peak of its check", "seconds"), rows, range(3))


# -- the service --------------------------------------------------------------------------------------------------


def _datasets() -> str:
    speeds = result("datasets")["megabytes_per_second"]["after"]
    rows = [(name, f"{speed:.0f}") for name, speed in speeds.items()]
    return table(("file", "MB/s"), rows, (1,))


LOADED = ("create a job", "list 20 jobs", "a bare insert")


def _load() -> str:
    databases = result("load")["milliseconds"]
    head = ["request", *(f"{name}, {title}" for name in databases for title in ("median", "p99"))]
    rows = []
    for request in LOADED:
        title = f"{request} through the same server" if "insert" in request else request
        times = [databases[name][request][key] for name in databases for key in ("p50_ms", "p99_ms")]
        rows.append((title, *(f"{time:.0f}" for time in times)))
    return table(head, rows, range(1, 5))


def _waiting() -> str:
    measured = result("service")
    creates, idle = measured["creates"], measured["idle"]["share_of_a_core"]
    waits = [
        f"{creates[name]['p50'] / 1e3:.2f} s and {creates[name]['max'] / 1e3:.2f} s"
        for name in ("SQLite", "PostgreSQL")
    ]
    rows = [
        (
            "from the create of a small job to its first step, the tenth of ten in a row",
            f"{measured['jobs']['tenth']:.1f} s",
        ),
        ("a create while 16 threads create, SQLite: median and maximum", waits[0]),
        ("the same on PostgreSQL", waits[1]),
        ("file checks per minute of a CPU-lane worker that has one core", f"{measured['checks']['per_minute']:.0f}"),
        (
            "CPU time of idle workers of both lanes, with 0 and with 10,000 queued jobs",
            f"{idle['0 jobs']:.2%} and {idle['10000 jobs']:.2%} of a core",
        ),
    ]
    return table(("measured", "value"), rows)


HISTORY = (
    "create a job", "list 20 jobs", "get the last job of the queue", "list models", "/metrics",
    "look for work that is not there", "claim a job", "inspect the leases", "keep house", "who uses a model",
    "forget events, when none is old",
)  # fmt: skip
"""The rows of the table of a long history."""
SHARE = "the steps of 20 workers, share of a core"


def _history() -> str:
    columns = [
        result("history")[when][name]["milliseconds"]
        for name in ("PostgreSQL", "SQLite")
        for when in ("before", "after")
    ]
    rows = [(name, *(f"{times[name]['p50']:,.1f}" for times in columns)) for name in HISTORY]
    rows.append((SHARE, *(f"{times[SHARE]['p50']:.1%}" for times in columns)))
    head = ("call or step", "PostgreSQL before", "after", "SQLite before", "after")
    return table(head, rows, range(1, 5))


def _tenants() -> str:
    measured = result("tenants")
    rows = [
        (
            name,
            f"{alone['p50']:.0f}",
            f"{measured['milliseconds under attack'][name]['p50']:.0f}",
            f"{measured['ratio of medians'][name]:.1f}",
        )
        for name, alone in measured["milliseconds alone"].items()
    ]
    return table(("request of the quiet project", "alone", "under attack", "ratio"), rows, range(1, 4))


def strikes() -> list[Any]:
    """Every strike of the fault harness that counts."""
    return [strike for run in result("faults") for part in run["parts"] for strike in part["strikes"]]


def misses() -> int:
    """The number of strikes that came too late or changed nothing."""
    return sum(len(part["misses"]) for run in result("faults") for part in run["parts"])


def counted(name: str) -> int:
    """A total over the runs of the fault harness, such as the jobs that succeeded."""
    return sum(part["counted"].get(name, 0) for run in result("faults") for part in run["parts"])


PARTS: dict[str, Callable[[], str]] = {
    "figures/engine, 1 epoch": partial(_engine, 1),
    "figures/engine, 3 epochs": partial(_engine, 3),
    "figures/engine, SFT": _engine_sft,
    "figures/engine in short": _engine_in_short,
    "figures/scaling": _scaling,
    "figures/scaling on paper": _scaling_on_paper,
    "figures/roofline": _roofline,
    "figures/rows": _rows,
    "figures/sampling": _sampling,
    "figures/reinforcement": _reinforcement,
    "figures/activations": _activations,
    "figures/checks": _checks,
    "figures/datasets": _datasets,
    "figures/load": _load,
    "figures/waiting times": _waiting,
    "figures/history": _history,
    "figures/tenants": _tenants,
    "figures/faults": lambda: by_fault(strikes()) + "\n",
    "figures/sentiment": lambda: sentiment_table(result("sentiment")) + "\n",
    "figures/sentiment, frontiers": lambda: frontiers(result("sentiment")) + "\n",
    "figures/sentiment, lists beside pairs": lambda: lists_beside_pairs(result("sentiment")) + "\n",
}
