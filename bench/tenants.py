"""`python -m bench.tenants`: what a project waits for while another one attacks with all that a key can do.

Two projects of one service, on PostgreSQL and with the default limits. The quiet project creates jobs, asks for reports
on new files and opens event streams: first alone, then while the other project and strangers without a key do all of
`ATTACKS` at once, from a process of their own. That process yields to the service, because attackers have machines of
their own. The goal: no more than twice the time.
"""

import argparse
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console

from app.migrate import migrate
from app.models import repository as models
from app.services import Services
from app.settings import Settings
from bench.machine import describe_machine
from bench.summary import summary
from tests.helpers.servers import free_port, postgres, wait_until
from tests.helpers.tiny_model import make_tiny_model
from worker.base_models import describe

RESULT = Path(__file__).parent / "results" / "tenants.json"
ADMIN_KEY = "a key for the bench of tenants"
ROUNDS = 40
ROW = {"prompt": "which one?", "chosen": "this", "rejected": "that"}
BODY = {"model": "tiny", "seed": 1, "method": {"type": "dpo"}}


@contextmanager
def service(home: Path, database: str) -> Iterator[str]:
    """An API and a worker of the CPU lane. Yields the API's URL."""
    make_tiny_model(home / "models" / "tiny")
    services = Services.of(Settings(home=home, database_url=database))
    migrate(services.database)
    with services.database.write() as session:
        models.register(session, "tiny", "r1", describe("tiny", home / "models" / "tiny").details)
    services.database.close()
    port = free_port()
    variables = {"DPO_HOME": str(home), "DPO_DATABASE_URL": database, "DPO_PORT": str(port), "DPO_ADMIN_KEY": ADMIN_KEY}
    commands = (["-m", "app.cli.main", "api"], ["-m", "worker", "cpu"])
    with (home / "bench.log").open("ab") as log:
        started = [
            subprocess.Popen([sys.executable, *each], env=os.environ | variables, stdout=log, stderr=log)
            for each in commands
        ]
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: httpx2.get(f"{url}/healthz").is_success, "the API", started[0])
        yield url
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


def client_of(url: str, key: str) -> httpx2.Client:
    return httpx2.Client(base_url=f"{url}/v1", headers={"Authorization": f"Bearer {key}"}, timeout=120)


def project(url: str, name: str) -> str:
    """A key of a new project with the limits that an operator would set for storage."""
    with client_of(url, ADMIN_KEY) as admin:
        admin.post("/projects", json={"id": name, "max_storage_bytes": 200_000_000}).raise_for_status()
        made = admin.post("/keys", json={"name": name, "project": name}).raise_for_status().json()
    key: str = made["key"]
    return key


def upload(client: httpx2.Client, rows: list[dict[str, Any]], **form: str) -> httpx2.Response:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return client.post("/files", files={"file": ("p.jsonl", content)}, data={"purpose": "fine-tune", **form})


def measure(url: str, key: str) -> dict[str, dict[str, float]]:
    """The milliseconds of a create, of a report on a new file, and of the first event of a stream."""
    times: dict[str, list[float]] = {"create a job": [], "report on a new file": [], "open a stream": []}

    def timed(name: str, work: Callable[[], None]) -> None:
        began = time.perf_counter()
        work()
        times[name].append(1000 * (time.perf_counter() - began))

    with client_of(url, key) as client:
        file_id = upload(client, [ROW]).raise_for_status().json()["id"]
        for number in range(ROUNDS):
            jobs = list[str]()

            def create(jobs: list[str] = jobs) -> None:
                made = client.post("/fine_tuning/jobs", json=BODY | {"training_file": file_id}).raise_for_status()
                jobs.append(made.json()["id"])

            def report(number: int = number) -> None:
                new = upload(client, [ROW | {"prompt": f"{number} {time.time()}"}]).raise_for_status().json()["id"]
                while client.get(f"/files/{new}/report").raise_for_status().json().get("status") == "pending":
                    time.sleep(0.02)

            def stream(jobs: list[str] = jobs) -> None:
                with client.stream("GET", f"/fine_tuning/jobs/{jobs[0]}/stream") as answer:
                    next(answer.iter_lines())

            timed("create a job", create)
            timed("report on a new file", report)
            timed("open a stream", stream)
            client.post(f"/fine_tuning/jobs/{jobs[0]}/cancel")
    return {name: summary(values, 1) for name, values in times.items()}


# -- the attacks ------------------------------------------------------------------------------------------------

Attack = Callable[[str, str], None]
"""One step of an attack with (URL, key). It is repeated without a pause."""


def flood(url: str, key: str) -> None:
    """As many requests as the rate allows, and more."""
    with client_of(url, key) as client:
        for _ in range(100):
            client.get("/fine_tuning/jobs")


def guess(url: str, _key: str) -> None:
    """Wrong keys."""
    httpx2.get(f"{url}/v1/files", headers={"Authorization": "Bearer dpo_guess"}, timeout=60)


def half_requests(url: str, _key: str) -> None:
    """Hundreds of connections with half a request each."""
    port, sockets = int(url.rpartition(":")[2]), list[socket.socket]()
    for _ in range(300):
        with suppress(OSError):
            half = socket.create_connection(("127.0.0.1", port), timeout=5)
            half.sendall(b"GET /healthz HTTP/1.1\r\nHost: local")
            sockets.append(half)
    time.sleep(5)
    for half in sockets:
        half.close()


def multiply(url: str, key: str) -> None:
    """A small file whose mapping would make a record of a gigabyte."""
    mapping = json.dumps({"prompt": "{x}" * 64, "chosen": "y", "rejected": "z"})
    with client_of(url, key) as client:
        upload(client, [{"x": "a" * 10_000_000, "y": "b", "z": "c"}], mapping=mapping)


def rank(url: str, key: str) -> None:
    """Rows of 64 answers, counted in tokens: 2,016 pairs each."""
    answers = [f"answer {number} of many words " * 5 for number in range(64)]
    with client_of(url, key) as client:
        answer = upload(client, [{"prompt": f"q {k} {time.time()}", "responses": answers} for k in range(200)])
        if answer.is_success:
            for _ in range(20):
                client.get(f"/files/{answer.json()['id']}/report", params={"model": "tiny"})
                time.sleep(0.2)


def fill(url: str, key: str) -> None:
    """Eight uploads at once, which together exceed the limit."""

    def send() -> None:
        with client_of(url, key) as client, suppress(httpx2.HTTPError):
            upload(client, [{"prompt": "a" * 30_000_000, "chosen": "b", "rejected": "c"}])

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def queue_up(url: str, key: str) -> None:
    """Sweeps of 64 jobs, of the highest priority."""
    with client_of(url, key) as client:
        answer = upload(client, [ROW])
        if answer.is_success:
            body = BODY | {"training_file": answer.json()["id"], "priority": 10}
            grid = {"learning_rate": [1e-5 * k for k in range(1, 65)]}
            client.post("/sweeps", json={"job": body, "grid": grid})


def call_home(url: str, key: str) -> None:
    """Webhooks to hosts that do not exist."""
    with client_of(url, key) as client:
        client.post(
            "/webhooks", json={"url": f"https://{time.time()}.invalid/hook", "events": ["fine_tuning.job.failed"]}
        )


def follow(url: str, key: str) -> None:
    """A hundred streams of one job."""
    with client_of(url, key) as client:
        jobs = client.get("/fine_tuning/jobs", params={"limit": 1})
        if not jobs.is_success or not jobs.json()["data"]:
            time.sleep(1)
            return
        path = f"/fine_tuning/jobs/{jobs.json()['data'][0]['id']}/stream"

        def read() -> None:
            with (
                suppress(httpx2.HTTPError, StopIteration),
                client_of(url, key) as own,
                own.stream("GET", path) as answer,
            ):
                next(answer.iter_lines())
                time.sleep(10)

        threads = [threading.Thread(target=read) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


ATTACKS: tuple[Attack, ...] = (flood, guess, half_requests, multiply, rank, fill, queue_up, call_home, follow)


def attack(url: str, key: str, names: list[str], counts: "multiprocessing.managers.DictProxy[str, int]") -> None:
    """Do attacks at once, again and again, until the process is killed."""
    os.nice(19)  # attackers bring machines of their own: this one is the service's

    def again(step: Attack) -> None:
        while True:
            with suppress(Exception):  # refused, cut, or timed out: that is what the service should do
                step(url, key)
            counts[step.__name__] = counts.get(step.__name__, 0) + 1
            time.sleep(0.1)

    for step in (step for step in ATTACKS if step.__name__ in names):
        threading.Thread(target=again, args=(step,), daemon=True).start()
    threading.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    all_names = [step.__name__ for step in ATTACKS]
    parser.add_argument("--only", nargs="+", choices=all_names, help="some of the attacks; keeps no figures")
    names: list[str] | None = parser.parse_args().only
    with tempfile.TemporaryDirectory() as name, postgres() as database, service(Path(name), database) as url:
        quiet, hostile = project(url, "quiet"), project(url, "hostile")
        measure(url, quiet)  # warms up
        alone = measure(url, quiet)
        with multiprocessing.Manager() as manager:
            counts = manager.dict()
            attacker = multiprocessing.get_context("spawn").Process(
                target=attack, args=(url, hostile, names or all_names, counts), daemon=True
            )
            attacker.start()
            time.sleep(10)
            attacked = measure(url, quiet)
            attacker.kill()
            attacker.join()
            steps = dict(counts)
    ratios = {name: round(attacked[name]["p50"] / alone[name]["p50"], 2) for name in alone}
    result = {"milliseconds alone": alone, "milliseconds under attack": attacked, "ratio of medians": ratios}
    Console(width=120).print(result, steps)
    if names is None:
        RESULT.write_text(json.dumps(result | {"attacks": steps, "machine": describe_machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
