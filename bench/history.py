"""`python -m bench.history`: what calls and loops cost after two years of 200 engineers, on PostgreSQL and SQLite.

The rows of two years are written by SQL. Then come requests to a real API, and the steps that each worker repeats.

    python -m bench.history                         300,000 jobs and models, 50 million events: half an hour
    python -m bench.history --events 5000000        fewer events
    python -m bench.history --database SQLite       one of the databases
    python -m bench.history --keep before           the name under which the result file keeps the figures

A request or step that takes more than a minute is measured once. A transaction is rolled back where it can be.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx2
from rich.console import Console
from sqlalchemy import update

from app.jobs import queue as job_queue
from app.jobs.states import Status
from app.jobs.tables import Job
from app.migrate import migrate
from app.models import repository as models
from app.services import Services
from app.settings import Settings
from bench.machine import describe_machine
from bench.summary import summary
from tests.helpers.history import History, fill
from tests.helpers.servers import free_port, postgres, wait_until
from worker import housekeeping
from worker.reaper import Reaper

RESULT = Path(__file__).parent / "results" / "history.json"
KEY = "a key for the bench of history"
WORKERS, INTERVAL_SECONDS = 20, 2.0
"""Workers of the installation, and the interval at which each repeats its steps."""
LONGEST_SECONDS, CALLS = 20.0, 200
"""A call is repeated `CALLS` times, or until it has taken so long."""
Call = Callable[[], object]


def timed(call: Call) -> dict[str, float]:
    """The figures of a call in milliseconds, after one that warms up unless it takes long."""
    milliseconds, began = list[float](), time.perf_counter()
    while len(milliseconds) < CALLS + 1 and time.perf_counter() - began < LONGEST_SECONDS:
        call_began = time.perf_counter()
        call()
        milliseconds.append(1000 * (time.perf_counter() - call_began))
    return summary(milliseconds[1:] or milliseconds, 1)


@contextmanager
def api(environment: dict[str, str]) -> Iterator[httpx2.Client]:
    """Starts an API. Yields a client of it."""
    port = free_port()
    variables = {"DPO_PORT": str(port), "DPO_ADMIN_KEY": KEY, "DPO_RATE_LIMIT": "0", "DPO_LOG_LEVEL": "error"}
    process = subprocess.Popen([sys.executable, "-m", "app.cli.main", "api"], env=os.environ | environment | variables)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: httpx2.get(f"{url}/healthz").status_code == 200, "the API", process)
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx2.Client(base_url=f"{url}/v1", headers=headers, timeout=600) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


def requests(client: httpx2.Client, history: History) -> dict[str, Call]:
    """Requests of the project with the longest queue."""
    project = {"name": "bench", "project": "project-1"}
    client.post("/projects/project-1", json={"max_queued_jobs": None})  # a version before schema 0013 has no limit
    key = client.post("/keys", json=project).raise_for_status().json()["key"]
    headers = {"Authorization": f"Bearer {key}"}
    content = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    uploaded = client.post(
        "/files", data={"purpose": "fine-tune"}, files={"file": ("p.jsonl", content)}, headers=headers
    )
    body = {"model": "tiny", "training_file": uploaded.raise_for_status().json()["id"]}

    def get(path: str, **params: int) -> Call:
        return lambda: client.get(path, params=params, headers=headers).raise_for_status()

    middle, last = f"ftjob-{history.jobs // 40 * 20 + 1:09d}", f"ftjob-{history.jobs - 2:09d}"
    return {
        "create a job": lambda: client.post("/fine_tuning/jobs", json=body, headers=headers).raise_for_status(),
        "list 20 jobs": get("/fine_tuning/jobs"),
        "list 20 evaluations": get("/evaluations"),
        "get the last job of the queue": get(f"/fine_tuning/jobs/{last}"),
        "list 20 events": get(f"/fine_tuning/jobs/{middle}/events"),
        "metrics of a job": get(f"/fine_tuning/jobs/{middle}/metrics"),
        "list models": get("/models"),
        "list 100 files": get("/files", limit=100),
        "/metrics": lambda: client.get(str(client.base_url).replace("/v1/", "/metrics")).raise_for_status(),
    }


def steps(services: Services) -> dict[str, Call]:
    """The steps of workers. The first three are those that each worker repeats."""
    database, reaper = services.database, Reaper(services)

    def rolled_back(work: Callable[..., object], *arguments: object) -> Call:
        def step() -> None:
            with database.write() as session:
                work(session, *arguments)
                session.rollback()

        return step

    def expire() -> None:
        housekeeping.expire(services)
        housekeeping.purge_deleted_files(services)

    def forget() -> None:
        """Ask for events that are older than all."""
        housekeeping.forget_old_events(database, 100 * 365 * 86400.0)

    return {
        "look for work that is not there": rolled_back(job_queue.claim, Status.QUEUED, "worker", ["another"], 10**12),
        "inspect the leases": reaper.inspect,
        "keep house": lambda: housekeeping.keep_house(services),
        "claim a job": rolled_back(job_queue.claim, Status.QUEUED, "worker", ["tiny"], 10**12),
        "expire, and purge deleted files": expire,
        "who uses a model": rolled_back(models.users_of, "ft:tiny:000000007"),
        "forget events, when none is old": forget,
    }


def measure(history: History, url: str | None, home: Path) -> dict[str, dict[str, float]]:
    settings = Settings(home=home, database_url=url) if url else Settings(home=home)
    services = Services.of(settings)
    migrate(services.database)
    with services.database.write() as session:
        models.register(session, "tiny", "r1", {})
    began = time.monotonic()
    fill(services, history)
    print(f"filled in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    rows = {}
    environment = {"DPO_HOME": str(home)} | ({"DPO_DATABASE_URL": url} if url else {})
    with api(environment) as client:
        for name, call in requests(client, history).items():
            rows[name] = timed(call)
            print(name, rows[name], file=sys.stderr, flush=True)
    with services.database.write() as session:  # what the requests have created
        session.execute(update(Job).where(Job.status == Status.VALIDATING).values(status=Status.CANCELLED))
    for name, call in steps(services).items():
        rows[name] = timed(call)
        print(name, rows[name], file=sys.stderr, flush=True)
    services.database.close()
    each = sum(rows[name]["p50"] for name in list(steps(services))[:3]) / 1000
    once = rows["expire, and purge deleted files"]["p50"] / 1000
    share = (WORKERS * each + once) / INTERVAL_SECONDS
    rows[f"the steps of {WORKERS} workers, share of a core"] = {"p50": round(share, 4)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=300_000, help="as many models, and a third as many files")
    parser.add_argument("--events", type=int, default=50_000_000)
    parser.add_argument("--queued", type=int, default=5000)
    parser.add_argument("--database", choices=["PostgreSQL", "SQLite"], help="default: both")
    parser.add_argument("--keep", default="after", help="the name of the figures in the result file")
    arguments = parser.parse_args()
    jobs = arguments.jobs
    history = History(
        jobs=jobs, events=arguments.events, models=jobs, queued=arguments.queued, running=WORKERS, files=jobs // 3,
        deliveries=jobs,
    )  # fmt: skip
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for database in [arguments.database] if arguments.database else ["PostgreSQL", "SQLite"]:
        with tempfile.TemporaryDirectory() as name, postgres() if database == "PostgreSQL" else nullcontext() as url:
            rows = measure(history, url, Path(name))
        Console(width=140).print(database, rows)
        results.setdefault(arguments.keep, {})[database] = {"history": vars(history), "milliseconds": rows}
        results["machine"] = describe_machine()
        RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
