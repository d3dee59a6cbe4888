"""`python -m bench.rows [--megabytes …] [--keep FILE]`: host memory of a training by the size of its file and by ranks.

A training of one step on generated pairs, in `ranks` processes. The figure is the peak of a rank's anonymous memory,
which no other process shares. What ranks map from files is not in it: the page cache holds it once for all, and the
system may drop it. The first run of a file tokenises it, in several processes of their own. Before, the check that each
upload gets reads the file.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from app.spec.json_types import JsonObject
from bench.machine import describe_machine
from tests.helpers.tiny_model import make_tiny_model
from tests.helpers.trainer import TrainerProcess, dpo_method, make_work_folder

SIZES, RANKS = (1, 100, 1000), (1, 2)
WORDS = ("alpha", "beta", "gamma", "delta", "river", "stone", "light", "cloud", "seven", "green")
SAMPLE_SECONDS = 0.05


def make_file(path: Path, megabytes: int) -> int:
    """Write pairs of about 900 bytes. Returns their number."""
    source, rows = random.Random(1), 0
    with path.open("w") as file:
        while file.tell() < megabytes * 1_000_000:
            prompt, chosen, rejected = (" ".join(source.choices(WORDS, k=count)) for count in (60, 40, 40))
            row = {"prompt": f"Question {rows}: {prompt}", "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n")
            rows += 1
    return rows


def measure(folder: Path, model: Path, file: Path, ranks: int, cache: Path) -> JsonObject:
    """Train one step. Returns the seconds until it begins, and the peak memory of the ranks in bytes."""
    # Without a reference, whose log-probs would take hours here and 16 bytes a row, in a file.
    method = dpo_method(loss="simpo", batch_size=64, max_steps=1)
    spec = {"method": method, "adapter": {"r": 4}, "quantization": "none", "seed": 1, "validation_split": 0}
    make_work_folder(folder, model, spec, ranks)
    (folder / "train.jsonl").symlink_to(file)
    if cache.exists():
        shutil.copytree(cache, folder / "cache", copy_function=os.link)
    peaks, done, began = defaultdict[int, int](int), threading.Event(), time.monotonic()
    with TrainerProcess(folder) as process:

        def sample() -> None:
            while not done.wait(SAMPLE_SECONDS):
                for rank in range(ranks):
                    beat = folder / "ranks" / str(rank) / "beat"
                    pid = process.pid if ranks == 1 else int(beat.read_text() or 0) if beat.exists() else 0
                    peaks[rank] = max(peaks[rank], anonymous_bytes(pid))

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        assert any(event["kind"] == "stage" for event in process.events()), process.log()
        seconds = time.monotonic() - began
        assert list(process.events())[-1]["kind"] == "done" and process.status() == 0, process.log()
        done.set()
        sampler.join()
    if not cache.exists():
        shutil.copytree(folder / "cache", cache, copy_function=os.link)
    return {"seconds": seconds, "peak_bytes": [peaks[rank] for rank in range(ranks)]}


def check(file: Path) -> JsonObject:
    """Check `file` as uploads are. Returns the seconds, and the peak memory of the process in bytes."""
    program = f"""
import json, time
from pathlib import Path
from app.spec.datasets.check import survey
began = time.monotonic()
with open({str(file)!r}, "rb") as file:
    report = survey(file)
assert report.error is None and report.kept == report.rows
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(json.dumps({{"seconds": time.monotonic() - began, "peak_bytes": 1024 * int(peak.split()[1])}}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    figures: JsonObject = json.loads(done.stdout)
    return figures


def anonymous_bytes(pid: int) -> int:
    """The anonymous memory of a process; 0 if it is not there."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rows", description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=SIZES, help="sizes of the files, ascending")
    parser.add_argument("--keep", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    runs, checks = [], []
    with tempfile.TemporaryDirectory(prefix="dpo-rows-") as name:
        folder = Path(name)
        model = make_tiny_model(folder / "model")
        for megabytes in arguments.megabytes:
            file = folder / f"{megabytes}.jsonl"
            rows = make_file(file, megabytes)
            checks.append({"megabytes": megabytes, "rows": rows} | check(file))
            for ranks in RANKS:
                figures = measure(folder / f"{megabytes}-{ranks}", model, file, ranks, folder / f"{megabytes}-cache")
                runs.append({"megabytes": megabytes, "rows": rows, "ranks": ranks} | figures)
    table = Table("file", "rows", "ranks", "peak of a rank", "above the smallest file")
    for run in runs:
        least = next(other for other in runs if other["ranks"] == run["ranks"])
        run["above"] = max(run["peak_bytes"]) - max(least["peak_bytes"])
        table.add_row(
            f"{run['megabytes']} MB",
            f"{run['rows']:,}",
            str(run["ranks"]),
            f"{max(run['peak_bytes']) / 1e6:.0f} MB",
            f"{run['above'] / 1e6:.0f} MB",
        )
    Console().print(table)
    table = Table("file", "peak of its check", "seconds")
    for one in checks:
        table.add_row(f"{one['megabytes']} MB", f"{one['peak_bytes'] / 1e6:.0f} MB", f"{one['seconds']:.0f}")
    Console().print(table)
    if arguments.keep is not None:
        arguments.keep.write_text(
            json.dumps({"machine": describe_machine(), "runs": runs, "checks": checks}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
