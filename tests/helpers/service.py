"""A real service for acceptance tests: `dpo serve` as a process tree, on any stack."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from openai import OpenAI

from tests.helpers.servers import CEILING, free_port, postgres, redis_server, s3, wait_until


@dataclass(frozen=True)
class Running:
    """A service that answers."""

    url: str
    key: str
    home: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def openai(self) -> OpenAI:
        """The official client; a response that is not the contract's raises."""
        return OpenAI(base_url=self.url, api_key=self.key, _strict_response_validation=True, max_retries=0)

    def http(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=CEILING)

    def job(self, job_id: str) -> dict[str, Any]:
        with self.http() as client:
            found: dict[str, Any] = client.get(f"/fine_tuning/jobs/{job_id}").raise_for_status().json()
        return found

    def until(self, ready: Callable[[], object], what: str) -> None:
        """Wait for what the running service brings about. Fail once the service has ended."""
        wait_until(ready, what, self.process)

    def wait_for(self, job_id: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The job, once `reached` holds for it."""
        seen: dict[str, Any] = {}

        def look() -> bool:
            seen.update(self.job(job_id))
            return reached(seen) or seen["status"] in ("failed", "cancelled", "succeeded")

        self.until(look, f"job {job_id}")
        assert reached(seen), f"the job ended as {seen['status']}: {seen['error']}"
        return seen

    def dpo(self, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run the command-line client."""
        environment = self.environment | {"DPO_BASE_URL": self.url, "DPO_API_KEY": self.key}
        command = [sys.executable, "-m", "app.cli.main", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CEILING, **options)


@contextmanager
def running(home: Path, extra: dict[str, str] | None = None) -> Iterator[Running]:
    """Start `dpo serve` with `home`/models as its base models; stop it with SIGTERM at the end."""
    port = free_port()
    # One thread: a tiny model gains nothing from two, and two that wait for each other on a busy machine crawl.
    own = {"DPO_HOME": str(home), "DPO_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment = os.environ | own | (extra or {})
    log = home / "serve.log"
    home.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli.main", "serve"], env=environment, stdout=output, stderr=output
        )
    url = f"http://127.0.0.1:{port}"
    try:

        def ready() -> bool:
            return httpx2.get(f"{url}/readyz").status_code == 200 and bool(service.openai().models.list().data)

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
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            # The fork server is where its worker is; a trainer at work is in the job's folder.
            if TRAINERS.intersection(command) and str((entry / "cwd").readlink()).startswith(str(home)):
                found.append(int(entry.name))
    return found


def trainer_at_work(home: Path) -> int:
    """The pid of the trainer that has a job: one that waits for one is where its worker is."""
    (found,) = [pid for pid in trainers(home) if Path(f"/proc/{pid}/cwd").readlink().parent.name == "work"]
    return found


@contextmanager
def held_until_asked_to_stop(pid: int) -> Iterator[None]:
    """Stop a process while the block runs, and go on once SIGTERM waits for it: it cannot have ended before."""
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
    """The first half of a request that uploads a file, as it goes over a socket: `size` bytes of the file."""
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


def create(client: httpx2.Client, **fields: Any) -> str:
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
    seen: dict[str, Any] = {}

    def look() -> bool:
        with service.http() as http:
            seen.update(http.get(f"/evaluations/{evaluation}").raise_for_status().json())
        return seen["status"] in ("succeeded", "failed", "cancelled")

    service.until(look, evaluation)
    assert seen["status"] == status, seen["error"]
    return seen
