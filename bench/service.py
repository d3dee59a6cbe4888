"""`python -m bench.service [PART …]`: the waiting times of a running service. Each part starts real processes.

- `jobs`: ten small jobs one after the other. Seconds from the create to the first optimizer step.
- `creates`: 16 threads create jobs at the same time, on SQLite and PostgreSQL. Milliseconds of a create.
- `checks`: file checks per minute of a worker of the CPU lane that has one core.
- `idle`: the CPU time of idle workers while 10,000 jobs wait for a base model that no worker serves.
- `download`: a file of 64 MB from an S3 store, by a client that reads 200 kB a second.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from sqlalchemy import insert, update

from app.database import new_id
from app.files.tables import File
from app.jobs.tables import Job
from app.migrate import migrate
from app.models import repository as models
from app.services import Services
from app.settings import Settings
from app.spec.job import JobSpec
from bench.machine import describe_machine
from bench.summary import summary
from tests.helpers.servers import free_port, postgres, s3, wait_until
from tests.helpers.service import running
from tests.helpers.tiny_model import make_tiny_model

RESULT = Path(__file__).parent / "results" / "service.json"
KEY, DATABASE = "a key for the bench", "DPO_DATABASE_URL"
ROWS = [
    {"prompt": f"Tell {k}.", "chosen": f"The fox {k} was kind.", "rejected": f"The fox {k} was sad."} for k in range(64)
]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def upload(client: httpx2.Client, content: bytes = CONTENT, purpose: str = "fine-tune") -> str:
    """The id of a new file."""
    answer = client.post("/files", files={"file": ("pairs.jsonl", content)}, data={"purpose": purpose})
    return str(answer.raise_for_status().json()["id"])


def job_of(file_id: str, **fields: object) -> dict[str, object]:
    """The body of a small job."""
    hyperparameters = {"max_steps": 5, "batch_size": 8}
    method = {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}
    return {"model": "tiny", "training_file": file_id, "method": method} | fields


def measure_jobs(home: Path) -> dict[str, Any]:
    """Seconds from the create of a job to its first step, for ten jobs that follow each other."""
    make_tiny_model(home / "models" / "tiny")
    seconds = []
    with running(home) as service, service.http() as client:
        file_id = upload(client)
        for _ in range(10):
            began = time.monotonic()
            job_id = client.post("/fine_tuning/jobs", json=job_of(file_id)).raise_for_status().json()["id"]
            path = f"/fine_tuning/jobs/{job_id}"
            while True:
                job = client.get(path).json()
                if (job["progress"] or {}).get("step"):
                    break
                require_alive(job)
                time.sleep(0.02)
            seconds.append(round(time.monotonic() - began, 2))
            while (job := client.get(path).json())["status"] != "succeeded":
                require_alive(job)
                time.sleep(0.02)
    return {"seconds": seconds, "tenth": seconds[-1]}


def require_alive(job: dict[str, Any]) -> None:
    """Raise `RuntimeError` if the job has failed or been cancelled."""
    if job["status"] in ("failed", "cancelled"):
        raise RuntimeError(f"{job['id']}: {job['error']}")


@contextmanager
def processes(home: Path, environment: dict[str, str], *parts: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """The API and `parts`, each a command of this Python. Yields the API's URL and the pids of the parts.

    The base model `tiny` is registered, as a worker of the GPU lane would do it.
    """
    port = free_port()
    variables = {"DPO_HOME": str(home), "DPO_PORT": str(port), "DPO_ADMIN_KEY": KEY, "DPO_RATE_LIMIT": "0"}
    full = os.environ | variables | environment
    url = environment.get(DATABASE)
    settings = Settings(home=home, database_url=url) if url else Settings(home=home)
    services = Services.of(settings)
    migrate(services.database)
    with services.database.write() as session:
        models.register(session, "tiny", "r1", {})
    services.database.close()
    commands = [["-m", "app.cli.main", "api"], *parts]
    with (home / "bench.log").open("ab") as log:
        started = [subprocess.Popen([sys.executable, *each], env=full, stdout=log, stderr=log) for each in commands]
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: httpx2.get(f"{url}/healthz").is_success, "the API", started[0])
        yield f"{url}/v1", [process.pid for process in started[1:]]
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


def client_of(url: str) -> httpx2.Client:
    return httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=600)


def measure_creates(home: Path) -> dict[str, Any]:
    """Milliseconds of a create while 16 threads create jobs."""
    figures = {}
    with postgres() as url:
        for name, environment in {"SQLite": {}, "PostgreSQL": {DATABASE: url}}.items():
            with processes(home / name, environment) as (api, _), client_of(api) as client:
                body = job_of(upload(client))

                def create(_: int, api: str = api, body: dict[str, object] = body) -> list[float]:
                    with client_of(api) as own:
                        times = [time.monotonic()]
                        for _ in range(40):
                            own.post("/fine_tuning/jobs", json=body).raise_for_status()
                            times.append(time.monotonic())
                    return [1000 * (after - before) for before, after in pairwise(times)]

                began = time.monotonic()
                with ThreadPoolExecutor(16) as pool:
                    milliseconds = [value for values in pool.map(create, range(16)) for value in values]
                rate = len(milliseconds) / (time.monotonic() - began)
            figures[name] = summary(milliseconds, 1) | {"creates_per_second": round(rate, 1)}
    return figures


def measure_checks(home: Path) -> dict[str, Any]:
    """File checks per minute of one worker that has one core. Each job has a file of its own."""
    core = min(os.sched_getaffinity(0))
    begin_worker = "sys.argv[1:] = ['cpu']; runpy.run_module('worker', run_name='__main__')"
    pinned = f"import os, runpy, sys; os.sched_setaffinity(0, [{core}]); {begin_worker}"
    with processes(home, {}, ["-c", pinned]) as (api, _), client_of(api) as client:
        files = [
            upload(client, CONTENT + json.dumps(ROWS[0] | {"prompt": f"{k}"}).encode() + b"\n") for k in range(120)
        ]
        wait_until(lambda: client.get(f"/files/{files[-1]}/report").status_code == 200, "the report of the last file")
        began = time.monotonic()
        jobs = [
            client.post("/fine_tuning/jobs", json=job_of(file_id)).raise_for_status().json()["id"] for file_id in files
        ]
        newest = {"limit": 100}  # the oldest are checked first
        wait_until(
            lambda: (
                not any(
                    job["status"] == "validating_files"
                    for job in client.get("/fine_tuning/jobs", params=newest).json()["data"]
                )
            ),
            "the checks",
        )
        seconds = time.monotonic() - began
    return {"checks": len(jobs), "seconds": round(seconds, 1), "per_minute": round(60 * len(jobs) / seconds)}


def cpu_seconds(pids: Sequence[int]) -> float:
    """The CPU time of processes and of all that they started."""
    total, waiting = 0, list(pids)
    while waiting:
        pid = waiting.pop()
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            children = Path(f"/proc/{pid}/task").glob("*/children")
            waiting += [int(child) for path in children for child in path.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += int(fields[11]) + int(fields[12])  # user and system time
    return total / CLOCK_TICKS


def measure_idle(home: Path) -> dict[str, Any]:
    """The share of a core that idle workers of both lanes use, with 10,000 jobs in the queue and without any."""
    shares = {}
    for count in (0, 10_000):
        folder = home / str(count)
        make_tiny_model(folder / "models" / "tiny")
        with processes(folder, {}, ["-m", "worker", "gpu"], ["-m", "worker", "cpu"]) as (api, pids):
            with client_of(api) as client:
                file_id = upload(client)
            fill_queue(folder, file_id, count)
            time.sleep(30)  # the spare trainer is made, and the first look at the queue is over
            before, began = cpu_seconds(pids), time.monotonic()
            time.sleep(60)
            shares[f"{count} jobs"] = round((cpu_seconds(pids) - before) / (time.monotonic() - began), 4)
    return {"share_of_a_core": shares}


def fill_queue(home: Path, file_id: str, count: int) -> None:
    """Queue `count` jobs that no worker can start. They read a deleted file, which housekeeping keeps for them."""
    services = Services.of(Settings(home=home, admin_key_value=KEY))
    spec = JobSpec(model="elsewhere", training_file=file_id).resolved().model_dump(mode="json")
    shared = {
        "project": "default", "model": "elsewhere", "base_model": "elsewhere", "training_file": file_id, "spec": spec,
        "priority": 0, "status": "queued", "paused": False, "ran_seconds": 0.0, "result_files": [], "attempt": 1,
        "eligible_at": 0.0, "lost_attempts": 0, "created_at": 1.7e9,
    }  # fmt: skip
    with services.database.write() as session:
        for _ in range(count // 1000):
            session.execute(insert(Job), [shared | {"id": new_id("ftjob")} for _ in range(1000)])
        session.execute(update(File).where(File.id == file_id).values(deleted_at=1.7e9))
    services.database.close()


@contextmanager
def throttled(port: int, bytes_per_second: int) -> Iterator[int]:
    """A proxy before `port` of this machine that passes on at most so many bytes of an answer. Yields its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", port)) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            threading.Thread(target=pump, args=(client, server, None), daemon=True).start()
            pump(server, client, bytes_per_second)
            client.shutdown(socket.SHUT_RDWR)  # the other thread still reads from it, so closing would say nothing

    def pump(source: socket.socket, target: socket.socket, limit: int | None) -> None:
        while chunk := source.recv(16384):
            target.sendall(chunk)
            if limit is not None:
                time.sleep(len(chunk) / limit)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with listener:
        yield listener.getsockname()[1]


def measure_download(home: Path) -> dict[str, Any]:
    """Whether a slow client gets the whole of a file that lies in S3, and how long that takes."""
    content = os.urandom(64_000_000)
    with s3() as store, processes(home, store) as (api, _), client_of(api) as client:
        file_id = upload(client, content, "user_data")
        with throttled(httpx2.URL(api).port or 80, 200_000) as port, client_of(f"http://127.0.0.1:{port}/v1") as slow:
            began, received, error = time.monotonic(), b"", None
            try:
                received = slow.get(f"/files/{file_id}/content").content
            except httpx2.HTTPError as broken:
                error = type(broken).__name__
            seconds = time.monotonic() - began
    return {"bytes": len(content), "seconds": round(seconds, 1), "whole": received == content, "error": error}


PARTS = {
    "jobs": measure_jobs,
    "creates": measure_creates,
    "checks": measure_checks,
    "idle": measure_idle,
    "download": measure_download,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"{', '.join(PARTS)}; default: all")
    for name in [name for name in os.environ if name.startswith(("DPO_", "AWS_"))]:
        del os.environ[name]  # no database or store but the bench's own
    results: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for part in parser.parse_args().parts:
        with tempfile.TemporaryDirectory() as name:
            results[part] = PARTS[part](Path(name)) | {"machine": describe_machine()}
        Console(soft_wrap=True).print(part, {key: value for key, value in results[part].items() if key != "machine"})
        RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
