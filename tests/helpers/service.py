"""A real service for acceptance tests: `dpo serve` as a process tree, on any stack."""

import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
from openai import OpenAI

from tests.helpers.servers import (
    CEILING,
    free_port,
    pgbouncer,
    postgres_server,
    postgres_url,
    redis_server,
    s3,
    wait_until,
)

DPO = str(Path(sys.executable).with_name("dpo"))
"""The command that users type."""
CERTIFICATES = ssl.create_default_context()
"""Shared by the `httpx2` clients: loading the certificates takes longer than a request."""


@dataclass(frozen=True)
class Running:
    """A running service, and what a client needs to reach it."""

    url: str
    key: str
    home: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    clients: list[OpenAI] = field(default_factory=list)
    """The official clients of the tests. They are closed with the service."""

    def openai(self) -> OpenAI:
        """The official client. It raises if a response breaks the contract."""
        client = OpenAI(base_url=self.url, api_key=self.key, _strict_response_validation=True, max_retries=0)
        self.clients.append(client)
        return client

    def http(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=CEILING, verify=CERTIFICATES)

    def in_project(self, project: str) -> "Running":
        """The same service with a key of the project `project`, which sees nothing of other projects."""
        with self.http() as client:
            client.post("/projects", json={"id": project}).raise_for_status()
            created = client.post("/keys", json={"name": project, "project": project}).raise_for_status().json()
        return replace(self, key=created["key"])

    def job(self, job_id: str) -> dict[str, Any]:
        with self.http() as client:
            job: dict[str, Any] = client.get(f"/fine_tuning/jobs/{job_id}").raise_for_status().json()
        return job

    def until(self, condition: Callable[[], object], description: str) -> None:
        """Wait until `condition` returns something true. Fail once the service has ended."""
        wait_until(condition, description, self.process)

    def wait_for(self, job_id: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until `condition` holds for the job. Returns the job. Fails if the job ends before."""
        job: dict[str, Any] = {}

        def holds_or_has_ended() -> bool:
            job.update(self.job(job_id))
            return condition(job) or job["status"] in ("failed", "cancelled", "succeeded")

        self.until(holds_or_has_ended, f"job {job_id}")
        assert condition(job), f"the job ended as {job['status']}: {job['error']}"
        return job

    def dpo(
        self, *arguments: str, stdin: str | None = None, folder: Path | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run the command-line client in `folder`, with `stdin` as its input."""
        environment = self.environment | {"DPO_BASE_URL": self.url, "DPO_API_KEY": self.key}
        return subprocess.run(
            [DPO, *arguments], env=environment, cwd=folder, input=stdin, capture_output=True, text=True, timeout=CEILING
        )


@contextmanager
def running(home: Path, extra: dict[str, str] | None = None, folder: Path | None = None) -> Iterator[Running]:
    """Start `dpo serve` in `folder`, with the base models of `home`/models. Stop it with SIGTERM at the end."""
    port = free_port()
    # One thread: a tiny model gains nothing from two, and on a busy machine they slow each other down.
    variables = {"DPO_HOME": str(home), "DPO_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment = os.environ | variables | (extra or {})
    log = home / "serve.log"
    home.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen([DPO, "serve"], env=environment, stdout=output, stderr=output, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:

        def ready() -> bool:
            with service.http() as client:
                return client.get(f"{url}/readyz").is_success and bool(client.get("/models").json()["data"])

        service = Running(f"{url}/v1", "", home, environment, process)
        service.until(lambda: (home / "admin.key").exists(), f"the admin key ({log})")
        service = Running(f"{url}/v1", (home / "admin.key").read_text().strip(), home, environment, process)
        service.until(ready, f"the service ({log})")
        yield service
        for client in service.clients:
            client.close()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@contextmanager
def server_stack() -> Iterator[dict[str, str]]:
    """The environment of a service on throwaway PostgreSQL (behind PgBouncer), Redis and S3 servers."""
    with ExitStack() as servers:
        pooler = servers.enter_context(pgbouncer(servers.enter_context(postgres_server())))
        yield {
            "DPO_DATABASE_URL": postgres_url(pooler.port),
            "DPO_BROKER_URL": servers.enter_context(redis_server()),
            **servers.enter_context(s3()),
        }


def trainer_pids(home: Path) -> list[int]:
    """Pids of the trainer processes that work under `home`."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            # The fork server runs in the folder of its worker. A busy trainer runs in the folder of its job.
            if "worker.trainer" in command and str((entry / "cwd").readlink()).startswith(str(home)):
                pids.append(int(entry.name))
    return pids


def busy_trainer_pid(home: Path) -> int:
    """The pid of the only trainer that has a job. An idle trainer runs in the folder of its worker."""
    (busy_pid,) = [pid for pid in trainer_pids(home) if Path(f"/proc/{pid}/cwd").readlink().parent.name == "work"]
    return busy_pid


@contextmanager
def frozen_until_sigterm(pid: int) -> Iterator[None]:
    """Freeze a process while the block runs, and until SIGTERM is pending. It cannot finish before the signal."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
        wait_until(lambda: _pending_signals(pid) & 1 << (signal.SIGTERM - 1), "SIGTERM")
    finally:
        os.kill(pid, signal.SIGCONT)


def _pending_signals(pid: int) -> int:
    """The bit mask of the signals that wait for the process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd:"))


def worker_pids(service: Running, lane: str) -> list[int]:
    """Pids of the worker processes of `lane` that this service started."""
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
    return [
        int(pid) for pid in children if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(f"worker\0{lane}\0".encode())
    ]


def half_upload(key: str, size: int) -> bytes:
    """The first half of a raw upload request, with the first `size` bytes of the file."""
    body = (
        b'--xx\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--xx\r\nContent-Disposition: form-data; name="file"; filename="p.jsonl"\r\n\r\n'
    ) + b"x" * size
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: multipart/form-data; boundary=xx\r\nContent-Length: {2 * len(body)}\r\n\r\n"
    )
    return head.encode() + body


def job_body(file_id: str, **changes: Any) -> dict[str, Any]:
    """The body of a job with 45 short steps, changed by `changes`. Its seed is fixed."""
    hyperparameters = {"batch_size": 8, "max_steps": 40, "checkpoint_every": 100, "learning_rate": 1e-3}
    return {
        "model": "tiny",
        "training_file": file_id,
        "seed": 5,
        "sft": {"hyperparameters": {"batch_size": 8, "max_steps": 5}},
        "method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters | changes.pop("hyperparameters", {})}},
        **changes,
    }


def create_job(client: httpx2.Client, **fields: object) -> str:
    """The id of a new job."""
    answer = client.post("/fine_tuning/jobs", json=fields)
    assert answer.status_code == 200, answer.text
    job_id: str = answer.json()["id"]
    return job_id


YES_NO_CLASSIFIER = {"terms": {"yes": [1.0, 1.0], "no": [1.0, -1.0]}, "intercept": 0.0, "normalise": False}
"""A classifier file. The score of a text is its count of `yes` minus its count of `no`."""


def upload(service: Running, path: Path, purpose: str) -> str:
    """The id of a new file."""
    with service.http() as http, path.open("rb") as file:
        answer = http.post("/files", files={"file": file}, data={"purpose": purpose}).raise_for_status()
    return str(answer.json()["id"])


def get_when_ready(client: httpx2.Client, method: str, path: str, **options: Any) -> httpx2.Response:
    """Repeat the request until the answer is not 202. Returns the answer, which has to be 200."""
    responses: list[httpx2.Response] = []

    def is_ready() -> bool:
        responses.append(client.request(method, path, **options))
        return responses[-1].status_code != 202

    wait_until(is_ready, path)
    assert responses[-1].status_code == 200, responses[-1].text
    return responses[-1]


def ended_evaluation(service: Running, evaluation_id: str, status: str = "succeeded") -> dict[str, Any]:
    """Wait until the evaluation has ended. Returns it. Fails if it has not ended with `status`."""
    return _ended(service, f"/evaluations/{evaluation_id}", status)


def ended_labelling(service: Running, labelling_id: str, status: str = "succeeded") -> dict[str, Any]:
    """Wait until the labelling has ended. Returns it. Fails if it has not ended with `status`."""
    return _ended(service, f"/labellings/{labelling_id}", status)


def _ended(service: Running, path: str, status: str) -> dict[str, Any]:
    job: dict[str, Any] = {}

    def has_ended() -> bool:
        with service.http() as http:
            job.update(http.get(path).raise_for_status().json())
        return job["status"] in ("succeeded", "failed", "cancelled")

    service.until(has_ended, path)
    assert job["status"] == status, job["error"]
    return job
