"""`make bench`: this engine beside TRL on the CPU, in one run with the same model, rows, batches and two threads.

Each entrant is a process of its own. They take turns, so that other work of the machine slows all of them. A figure is
the median of `RUNS` runs, with its spread, and counts the reference pass. The rows have the lengths of Anthropic HH,
from `DPO_SHARED`. Without that folder they come from a log-normal distribution with HH's medians. The table says which.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from app.spec.json_types import JsonObject
from bench.entrants import BATCH, MAX_LENGTH, THREADS
from bench.inputs import HH, VOCABULARY, Arithmetic, Pairs, lengths_of, make_model, make_pairs
from bench.machine import describe_machine

PAIRS, RUNS, EPOCHS = 16, 3, (1, 3)
DPO = ("dpo-service", "TRL default", "TRL precomputed reference", "TRL best options")
SFT = ("dpo-service", "TRL packed", "TRL packed, no checkpointing")
SCHEMES = {
    "TRL default": {"reference_each_step": True, "recompute": True},
    "TRL precomputed reference": {"reference_each_step": False, "recompute": True},
    "TRL best options": {"reference_each_step": False, "recompute": False},
}
Measured = dict[str, list[dict[str, float]]]
"""The runs of each entrant: `seconds` and `peak_bytes`."""


class Entrant:
    """The process of an entrant."""

    def __init__(self, name: str, folder: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""}
        with (folder / f"{name}.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.entrants", name, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self._log = folder / f"{name}.log"

    def run(self, task: str, epochs: int) -> dict[str, float]:
        """The `seconds` and `peak_bytes` of one run of the task `dpo` or `sft`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"task": task, "epochs": epochs}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"An entrant failed:\n{self._log.read_text()[-4000:]}")
        result: dict[str, float] = json.loads(answer)
        return result

    def end(self) -> None:
        self._process.communicate()


def measure(names: tuple[str, ...], folder: Path, task: str, epochs: int) -> Measured:
    """`RUNS` runs of each entrant, in turn. Each first has a short run that does not count."""
    entrants = {name: Entrant(name, folder) for name in names}
    measured: Measured = {name: [] for name in names}
    for entrant in entrants.values():
        entrant.run(task, 1)
    for _ in range(RUNS):
        for name, entrant in entrants.items():
            measured[name].append(entrant.run(task, epochs))
    for entrant in entrants.values():
        entrant.end()
    return measured


def table(title: str, measured: Measured, items: int, tokens: int, unit: str, bounds: dict[str, float]) -> Table:
    """A row for each entrant: throughput with its spread, memory, and how many times as fast this engine is.

    A run covers `items` of the `unit` and `tokens` tokens. `bounds` are the ratios by FLOPs alone.
    """
    rows = Table(title=title, title_justify="left")
    headings = (unit, "spread", "tokens/s", "peak memory", "dpo-service is")
    for heading in ("engine", *headings, *(["by FLOPs alone"] if bounds else [])):
        rows.add_column(heading, justify="left" if heading == "engine" else "right")
    fastest = statistics.median(run["seconds"] for run in measured["dpo-service"])
    for name, runs in measured.items():
        seconds = sorted(run["seconds"] for run in runs)
        median, peak = statistics.median(seconds), max(run["peak_bytes"] for run in runs)
        rows.add_row(
            name,
            f"{items / median:.2f}",
            f"{items / seconds[-1]:.2f} to {items / seconds[0]:.2f}",
            f"{tokens / median:,.0f}",
            f"{peak / 1e6:,.0f} MB",
            "" if name == "dpo-service" else f"{median / fastest:.1f} × as fast",
            *([f"{bounds[name]:.1f} ×" if name in bounds else ""] if bounds else []),
        )
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lengths, source = lengths_of(HH, PAIRS, (70, 32, 24))
    pairs: Pairs = make_pairs(lengths, MAX_LENGTH)
    console, results = Console(width=130), Path(__file__).parent / "results"
    machine = describe_machine() | {"threads": THREADS}
    record: JsonObject = {"machine": machine, "rows": f"{PAIRS} pairs, {source}, at most {MAX_LENGTH} tokens"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make_model(folder / "model", MAX_LENGTH)
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        head = VOCABULARY * 256
        arithmetic = Arithmetic.of(pairs, parameters - 2 * head, head)
        setting = f"{record['rows']}, batch {BATCH}, {parameters / 1e6:.1f} M parameters, fp32, LoRA 16"
        for epochs in EPOCHS:
            runs = measure(DPO, folder, "dpo", epochs)
            bounds = {peer: arithmetic.bound(epochs, **scheme) for peer, scheme in SCHEMES.items()}
            title = f"DPO, {epochs} epoch{'s' * (epochs > 1)}, {setting}"
            console.print(table(title, runs, epochs * PAIRS, epochs * arithmetic.shared, "pairs/s", bounds))
            record[f"dpo, {epochs} epochs"] = runs | {"bounds": bounds}
        runs = measure(SFT, folder, "sft", 3)
        tokens = 3 * sum(len(f"{pair['prompt']} {pair['chosen']}".split()) + 2 for pair in pairs)
        console.print(
            table(f"SFT on the chosen answers, packed, 3 epochs, {setting}", runs, tokens, tokens, "tokens/s", {})
        )
        record["sft, 3 epochs"] = runs
    results.mkdir(exist_ok=True)
    (results / "cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"{machine}\nwritten to {results / 'cpu.json'}", highlight=False)


if __name__ == "__main__":
    main()
