"""A real service for acceptance tests: `dpo serve` as a process tree, on any stack."""

import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
from openai import DefaultHttpxClient, OpenAI

from tests.helpers.servers import CEILING, free_port, postgres, redis_server, s3, wait_until

CERTIFICATES = ssl.create_default_context()
"""Shared by all clients: to load the certificates for each one costs more than the request that it makes."""


@dataclass(frozen=True)
class Running:
    """A running service, and what a client needs to reach it."""

    url: str
    key: str
    home: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def openai(self) -> OpenAI:
        """The official client; a response that is not the contract's raises."""
        return OpenAI(
            base_url=self.url, api_key=self.key, _strict_response_validation=True, max_retries=0,
            http_client=DefaultHttpxClient(verify=CERTIFICATES),
        )  # fmt: skip

    def http(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self.key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=CEILING, verify=CERTIFICATES)

    def in_project(self, project: str) -> "Running":
        """The same service to a client whose key belongs to `project`: it sees only what it made itself."""
        with self.http() as client:
            created = client.post("/keys", json={"name": project, "project": project}).raise_for_status().json()
        return replace(self, key=created["key"])

    def job(self, job_id: str) -> dict[str, Any]:
        with self.http() as client:
            public_job: dict[str, Any] = client.get(f"/fine_tuning/jobs/{job_id}").raise_for_status().json()
        return public_job

    def until(self, ready: Callable[[], object], what: str) -> None:
        """Wait until `ready` returns something true. Fail once the service has ended."""
        wait_until(ready, what, self.process)

    def wait_for(self, job_id: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The job, once `reached` holds for it."""
        state: dict[str, Any] = {}

        def look() -> bool:
            state.update(self.job(job_id))
            return reached(state) or state["status"] in ("failed", "cancelled", "succeeded")

        self.until(look, f"job {job_id}")
        assert reached(state), f"the job ended as {state['status']}: {state['error']}"
        return state

    def dpo(self, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run the command-line client."""
        environment = self.environment | {"DPO_BASE_URL": self.url, "DPO_API_KEY": self.key}
        command = [sys.executable, "-m", "app.cli.main", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CEILING, **options)


@contextmanager
def running(home: Path, extra: dict[str, str] | None = None) -> Iterator[Running]:
    """Start `dpo serve` with `home`/models as its base models; stop it with SIGTERM at the end."""
    port = free_port()
    # One thread: a tiny model gains nothing from two, and on a busy machine two slow each other down.
    variables = {"DPO_HOME": str(home), "DPO_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment = os.environ | variables | (extra or {})
    log = home / "serve.log"
    home.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli.main", "serve"], env=environment, stdout=output, stderr=output
        )
    url = f"http://127.0.0.1:{port}"
    try:

        def ready() -> bool:
            return httpx2.get(f"{url}/readyz", verify=CERTIFICATES).is_success and bool(
                service.openai().models.list().data
            )

        service = Running(f"{url}/v1", "", home, environment, process)
        service.until(lambda: (home / "admin.key").exists(), f"the admin key ({log})")
        service = Running(f"{url}/v1", (home / "admin.key").read_text().strip(), home, environment, process)
        service.until(ready, f"the service ({log})")
        yield service
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@contextmanager
def stack(name: str) -> Iterator[dict[str, str]]:
    """The environment of the stack `embedded`, or of `servers`: PostgreSQL, Redis and S3, each throwaway."""
    if name == "embedded":
        yield {}
        return
    with ExitStack() as servers:
        yield {
            "DPO_DATABASE_URL": servers.enter_context(postgres()),
            "DPO_BROKER_URL": servers.enter_context(redis_server()),
            **servers.enter_context(s3()),
        }


TRAINERS = {"worker.trainer", "worker.trainer.fork_server"}


def trainers(home: Path) -> list[int]:
    """Pids of the trainer processes that work under `home`."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            # The fork server runs in the folder of its worker, a busy trainer in the folder of its job.
            if TRAINERS.intersection(command) and str((entry / "cwd").readlink()).startswith(str(home)):
                pids.append(int(entry.name))
    return pids


def trainer_at_work(home: Path) -> int:
    """The pid of the trainer that has a job. An idle trainer is in the folder of its worker."""
    (busy_pid,) = [pid for pid in trainers(home) if Path(f"/proc/{pid}/cwd").readlink().parent.name == "work"]
    return busy_pid


@contextmanager
def held_until_asked_to_stop(pid: int) -> Iterator[None]:
    """Stop a process while the block runs. It goes on once SIGTERM is pending, so it cannot end before."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
        wait_until(lambda: _waiting_signals(pid) & 1 << (signal.SIGTERM - 1), "SIGTERM")
    finally:
        os.kill(pid, signal.SIGCONT)


def _waiting_signals(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd:"))


def lanes(service: Running, lane: str) -> list[int]:
    """Pids of the worker processes of `lane` that this service started."""
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
    return [
        int(pid) for pid in children if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(f"worker\0{lane}\0".encode())
    ]


def half_upload(key: str, size: int) -> bytes:
    """The first half of an upload request as raw bytes. It holds `size` bytes of the file."""
    body = (
        b'--xx\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--xx\r\nContent-Disposition: form-data; name="file"; filename="p.jsonl"\r\n\r\n'
    ) + b"x" * size
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: multipart/form-data; boundary=xx\r\nContent-Length: {2 * len(body)}\r\n\r\n"
    )
    return head.encode() + body


def body(file_id: str, **changes: Any) -> dict[str, Any]:
    """A job of 45 short steps, the same bits each time."""
    hyperparameters = {"batch_size": 8, "max_steps": 40, "checkpoint_every": 100, "learning_rate": 1e-3}
    return {
        "model": "tiny",
        "training_file": file_id,
        "seed": 5,
        "sft": {"hyperparameters": {"batch_size": 8, "max_steps": 5}},
        "method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters | changes.pop("hyperparameters", {})}},
        **changes,
    }


def create(client: httpx2.Client, **fields: object) -> str:
    answer = client.post("/fine_tuning/jobs", json=fields)
    assert answer.status_code == 200, answer.text
    job_id: str = answer.json()["id"]
    return job_id


CLASSIFIER = {"terms": {"yes": [1.0, 1.0], "no": [1.0, -1.0]}, "intercept": 0.0, "normalise": False}


def upload(service: Running, path: Path, purpose: str) -> str:
    with service.http() as http, path.open("rb") as file:
        answer = http.post("/files", files={"file": file}, data={"purpose": purpose}).raise_for_status()
    return str(answer.json()["id"])


def ended(service: Running, evaluation: str, status: str = "succeeded") -> dict[str, Any]:
    """The evaluation, once it has ended with `status`."""
    state: dict[str, Any] = {}

    def look() -> bool:
        with service.http() as http:
            state.update(http.get(f"/evaluations/{evaluation}").raise_for_status().json())
        return state["status"] in ("succeeded", "failed", "cancelled")

    service.until(look, evaluation)
    assert state["status"] == status, state["error"]
    return state
