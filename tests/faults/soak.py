"""`python -m tests.faults.soak --minutes 30`: a service that works steadily must not grow.

`dpo serve` runs on the embedded stack. A client uploads, trains, streams, downloads and deletes, again and again. After
each job the memory, file handles and threads of each process are read. So are the rows and objects for each job. Exit
status: 0 if nothing has grown from the second quarter to the last.
"""

import argparse
import json
import sqlite3
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from app.services import Services
from app.settings import Settings
from tests.helpers.preferences import pairs
from tests.helpers.servers import wait_until
from tests.helpers.service import Running, running, worker_pids
from tests.helpers.tiny_model import make_tiny_model

GROWTH = 1.05
"""Permitted growth from the second quarter to the last. An allocator's fragments cause some."""
Sample = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory(prefix="dpo-soak-") as name:
        home = Path(name) / "home"
        make_tiny_model(home / "models" / "tiny")
        with running(home, {"DPO_RATE_LIMIT": "0"}) as service:
            samples, jobs = soak(service, minutes)
    print(f"{jobs} jobs in {minutes:.0f} minutes, {len(samples)} samples\n")
    print("| | first quarter | second | third | last |\n|---|---:|---:|---:|---:|")
    grown = []
    for measure in samples[0]:
        quarters = [
            statistics.median(
                sample[measure] for sample in samples[len(samples) * k // 4 : len(samples) * (k + 1) // 4]
            )
            for k in range(4)
        ]
        print(f"| {measure} | " + " | ".join(f"{value:.2f}" for value in quarters) + " |")
        if quarters[3] > quarters[1] * GROWTH + 0.5:
            grown.append(measure)
    print("\n" + (f"GREW: {', '.join(grown)}" if grown else "Nothing grew."))
    return 1 if grown else 0


def soak(service: Running, minutes: float) -> tuple[list[Sample], int]:
    """Work for `minutes`; returns the samples and the number of jobs."""
    deadline, samples, jobs = time.monotonic() + 60 * minutes, list[Sample](), 0
    client = service.openai()
    content = "\n".join(json.dumps(row) for row in pairs(24, seed=4)).encode()
    while time.monotonic() < deadline:
        file = client.files.create(file=("pairs.jsonl", content), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model="tiny",
            training_file=file.id,
            seed=1,
            method={"type": "dpo"},
            extra_body={"method": {"type": "dpo", "dpo": {"hyperparameters": {"max_steps": 4, "batch_size": 4}}}},
        )
        with service.http() as http:
            with http.stream("GET", f"/fine_tuning/jobs/{job.id}/stream") as stream:
                for _ in stream.iter_bytes():
                    pass
            ended = service.wait_for(job.id, lambda state: state["status"] == "succeeded")
            http.get(f"/models/{ended['fine_tuned_model']}/download").raise_for_status()
            http.get("/fine_tuning/jobs").raise_for_status()
            http.get("/dashboard")
            http.delete(f"/models/{ended['fine_tuned_model']}").raise_for_status()
            for used in (file.id, *ended["result_files"]):
                http.delete(f"/files/{used}").raise_for_status()
        jobs += 1
        wait_until(partial(_gone, service.home / "objects" / "files" / file.id), "housekeeping")
        samples.append(_sample(service, jobs))
    return samples, jobs


def _gone(path: Path) -> bool:
    return not path.exists()


def _sample(service: Running, jobs: int) -> Sample:
    pids = {
        "supervisor": service.process.pid,
        "GPU lane": worker_pids(service, "gpu")[0],
        "CPU lane": worker_pids(service, "cpu")[0],
    }
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
    pids["API"] = next(int(pid) for pid in children if int(pid) not in pids.values())
    sample: Sample = {}
    for name, pid in pids.items():
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        sample[f"{name}: MB of memory"] = int(status["VmRSS"].split()[0]) / 1024
        sample[f"{name}: file handles"] = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        sample[f"{name}: threads"] = int(status["Threads"])
    database = sqlite3.connect(service.home / "dpo.sqlite3")
    for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        if not table.startswith("sqlite_"):
            (rows,) = database.execute(f'SELECT count(*) FROM "{table}"').fetchone()
            sample[f"rows of {table} for each job"] = rows / jobs
    database.close()
    storage = Services.of(Settings(home=service.home)).storage
    sample["objects for each job"] = (
        sum(len(storage.list(prefix)) for prefix in ("files", "jobs", "uploads", "merged")) / jobs
    )
    sample["objects of the cache"] = len(storage.list("cache"))
    sample["folders of work"] = len(list((service.home / "work").iterdir()))
    return sample


if __name__ == "__main__":
    sys.exit(main())
