"""`python -m bench.load`: response times of the API with 10,000 jobs and 100,000 events, on SQLite and PostgreSQL.

The API is a real process with its real server. One client sends requests one after the other on a kept connection. An
extra endpoint in the same process only inserts one row. Its time shows the speed of the machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
from fastapi import Request
from rich.console import Console
from rich.table import Table
from sqlalchemy import insert, text

from app.database import new_id
from app.jobs.tables import Job, JobEvent
from app.main import create_app
from app.main import serve as run_server
from app.migrate import migrate
from app.models import repository as models
from app.services import Services
from app.settings import Settings
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from bench.machine import describe_machine
from bench.summary import summary
from tests.helpers.servers import free_port, postgres, wait_until

JOBS, EVENTS, CALLS = 10_000, 100_000, 500
RESULT = Path(__file__).parent / "results" / "load.json"


def fill(services: Services) -> str:
    """Insert jobs and their events, like those of a year. Returns the id of a job with many events."""
    spec = JobSpec(model="tiny", training_file="file-x", metadata={"team": "a"}).resolved().model_dump(mode="json")
    states = ["succeeded"] * 8 + ["failed", "cancelled", "queued"]
    shared = {
        "model": "tiny",
        "base_model": "tiny",
        "training_file": "file-x",
        "spec": spec,
        "priority": 0,
        "paused": False,
        "ran_seconds": 1.0,
        "result_files": [],
        "attempt": 2,
        "eligible_at": 0.0,
        "lost_attempts": 0,
    }
    jobs: list[JsonObject] = [
        {
            **shared,
            "id": new_id("ftjob"),
            "project": "default" if k % 2 else "other",
            "created_at": 1.7e9 + k,
            "job_metadata": {"team": "ab"[k % 2]},
            "status": states[k % len(states)],
        }
        for k in range(JOBS)
    ]
    with services.database.write() as session:
        models.register(session, "tiny", "r1", {})
        for first in range(0, JOBS, 1000):
            session.execute(insert(Job), jobs[first : first + 1000])
        for first in range(0, EVENTS, 5000):
            events = [
                {
                    "id": new_id("ftevent"),
                    "job_id": jobs[(first + k) % JOBS if k % 50 else 1]["id"],
                    "created_at": 1.7e9,
                    "level": "info",
                    "type": "metrics",
                    "message": "Step",
                    "data": {"step": k, "stage": "dpo", "loss": 0.5},
                }
                for k in range(5000)
            ]
            session.execute(insert(JobEvent), events)
        session.execute(text("CREATE TABLE bare (id INTEGER PRIMARY KEY, body TEXT)"))
    job_id: str = jobs[1]["id"]
    return job_id


def serve() -> None:
    """Serve the API with the extra endpoint `/v1/bare`."""
    settings = Settings()
    app = create_app(settings)
    services: Services = app.state.services
    counter = iter(range(10**9))

    @app.post("/v1/bare")
    def bare(_request: Request) -> dict[str, str]:
        with services.database.write() as session:
            session.execute(text("INSERT INTO bare (id, body) VALUES (:id, 'x')"), {"id": next(counter)})
        return {"status": "ok"}

    run_server(app, settings)


@contextmanager
def api(environment: dict[str, str]) -> Iterator[httpx2.Client]:
    """Starts an API with these variables. Yields a client of it."""
    port = free_port()
    variables = environment | {"DPO_PORT": str(port), "DPO_ADMIN_KEY": "a key for the bench", "DPO_RATE_LIMIT": "0"}
    process = subprocess.Popen([sys.executable, "-m", "bench.load", "--serve"], env=os.environ | variables)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: httpx2.get(f"{url}/healthz").status_code == 200, "the API")
        headers = {"Authorization": "Bearer a key for the bench"}
        with httpx2.Client(base_url=f"{url}/v1", headers=headers, timeout=60) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


def timed(call: Callable[[], httpx2.Response]) -> list[float]:
    """Milliseconds of each of `CALLS` calls, after 20 that do not count."""
    for _ in range(20):
        call().raise_for_status()
    milliseconds = []
    for _ in range(CALLS):
        began = time.perf_counter()
        answer = call()
        milliseconds.append(1000 * (time.perf_counter() - began))
        answer.raise_for_status()
    return milliseconds


def measure(environment: dict[str, str], home: Path) -> dict[str, dict[str, float]]:
    """The median, the 99th percentile and the maximum of each call, in milliseconds."""
    url = environment.get("DPO_DATABASE_URL", "")
    settings = Settings(home=home, database_url=url) if url else Settings(home=home)
    services = Services.of(settings)
    migrate(services.database)
    job_id = fill(services)
    services.database.close()
    rows = {}
    with api(environment | {"DPO_HOME": str(home)}) as client:
        file = client.post(
            "/files", data={"purpose": "fine-tune"}, files={"file": ("p.jsonl", b'{"text": "a"}\n')}
        ).json()
        body = {"model": "tiny", "training_file": file["id"]}
        calls: dict[str, Callable[[], httpx2.Response]] = {
            "a bare insert": lambda: client.post("/bare"),
            "create a job": lambda: client.post("/fine_tuning/jobs", json=body),
            "list 20 jobs": lambda: client.get("/fine_tuning/jobs"),
            "list 20 jobs by metadata": lambda: client.get("/fine_tuning/jobs", params={"metadata[team]": "b"}),
            "list 20 events": lambda: client.get(f"/fine_tuning/jobs/{job_id}/events"),
            "get a job": lambda: client.get(f"/fine_tuning/jobs/{job_id}"),
            "list 20 files": lambda: client.get("/files", params={"limit": 20}),
        }
        for name, call in calls.items():
            rows[name] = {f"{figure}_ms": value for figure, value in summary(timed(call), 2).items()}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", action="store_true")
    if parser.parse_args().serve:
        serve()
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as name:
        stacks: dict[str, dict[str, str]] = {
            "SQLite": {},
            "PostgreSQL": {"DPO_DATABASE_URL": stack.enter_context(postgres())},
        }
        for database, environment in stacks.items():
            results[database] = measure(environment, Path(name) / database)
    table = Table(title=f"{JOBS} jobs, {EVENTS} events, {CALLS} calls each, milliseconds")
    for column in ("", *(f"{database} {value}" for database in results for value in ("p50", "p99"))):
        table.add_column(column, justify="right" if column else "left")
    for call in results["SQLite"]:
        cells = [str(results[database][call][f"{value}_ms"]) for database in results for value in ("p50", "p99")]
        table.add_row(call, *cells)
    Console(width=120).print(table)
    RESULT.write_text(json.dumps({"machine": describe_machine(), "milliseconds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
