"""Jobs that are submitted until the service accepts them, and the checks of their outcome."""

import csv
import hashlib
import io
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import func, select

from app.database import new_id
from app.files.tables import File
from app.jobs.states import ACTIVE
from app.jobs.tables import Checkpoint, Job, JobEvent
from app.models.tables import Model
from app.prune import prune
from tests.faults.cluster import ADMIN_KEY, Cluster, Line, processes
from tests.helpers.preferences import pairs
from tests.helpers.servers import wait_until
from tests.helpers.trainer import TIME_DEPENDENT

LONG: dict[str, Any] = {
    "model": "tiny",
    "seed": 11,
    "sft": {"hyperparameters": {"n_epochs": 1, "batch_size": 4, "checkpoint_every": 5, "learning_rate": 1e-3}},
    "method": {
        "type": "dpo",
        "dpo": {
            "hyperparameters": {
                "batch_size": 4,
                "max_steps": 240,
                "checkpoint_every": 12,
                "eval_every": 120,
                "learning_rate": 1e-3,
            }
        },
    },
    "resources": {"gpus": {"max": 2}},
}
"""A training that outlives a few faults. Each attempt takes one device or two, whatever is free."""
SHORT = LONG | {
    "sft": None,
    "method": {"type": "dpo", "dpo": {"hyperparameters": {"batch_size": 8, "max_steps": 8, "learning_rate": 1e-3}}},
}
WIDE: dict[str, Any] = LONG | {
    "sft": None,
    "method": {
        "type": "dpo",
        "dpo": {"hyperparameters": {"batch_size": 30, "max_steps": 60, "checkpoint_every": 4, "learning_rate": 1e-3}},
    },
}
"""A training for several machines."""
BODIES = {"long": LONG, "short": SHORT, "wide": WIDE}
ON_MACHINES: dict[str, Any] = {"model": "wide", "resources": {"gpus": {"min": 3, "max": 4}, "nodes": 2}}
"""A base model that only machines of a Ray cluster have, and more devices than one machine has."""


@dataclass(frozen=True)
class Result:
    """Hashes of a training's adapter, and of its metrics that do not depend on time."""

    adapter: str
    metrics: str


@dataclass
class Attempt:
    """A running trainer: its job, attempt, worker and process."""

    job: str
    number: int
    program: str
    pid: int
    seen_at: float


@dataclass
class Workload:
    """A client that does not give up. `accepted` holds the jobs that the service has accepted."""

    cluster: Cluster
    random: random.Random
    accepted: list[str] = field(default_factory=list)
    requested_at: dict[str, float] = field(default_factory=dict)
    """The time of the first request for each accepted job."""
    kinds: dict[str, str] = field(default_factory=dict)
    """Which of `BODIES` each accepted job has."""
    expected: dict[str, Result] = field(default_factory=dict)
    """The result of an undisturbed training of a kind."""
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        port = self.cluster.front.port
        self.http = httpx2.Client(
            base_url=f"http://127.0.0.1:{port}/v1", headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=20
        )

    def close(self) -> None:
        self.http.close()

    def prepare(self) -> None:
        """Upload the pairs, and record the results of undisturbed trainings."""
        content = "\n".join(json.dumps(row) for row in pairs(40, seed=5)).encode()
        wait_until(lambda: self.http.get("/models").json()["data"], "the base model")
        answer = self.http.post(
            "/files", files={"file": ("pairs.jsonl", content)}, data={"purpose": "fine-tune"}
        ).raise_for_status()
        self.file = answer.json()["id"]
        for kind in ("long", "short"):
            self.expect(kind)

    def expect(self, kind: str) -> None:
        """Record the result of an undisturbed training of a kind."""
        job = self.submit(kind)
        self.wait_end(job)
        self.expected[kind] = self.result(job)

    def submit(self, kind: str = "long", priority: int = 0, **fields: Any) -> str:
        """Create a job. The request is repeated with the same idempotency key until the service answers."""
        headers, requested_at = {"Idempotency-Key": new_id("key")}, time.monotonic()
        body = BODIES[kind] | {"training_file": self.file, "priority": priority} | fields

        def created() -> bool:
            answer = self.http.post("/fine_tuning/jobs", json=body, headers=headers)
            if answer.status_code >= 500:
                return False
            assert answer.status_code == 200, answer.text
            self.accepted.append(answer.json()["id"])
            return True

        wait_until(created, "a new job")
        self.requested_at[self.accepted[-1]] = requested_at
        self.kinds[self.accepted[-1]] = kind
        return self.accepted[-1]

    def cancel(self, job: str) -> None:
        wait_until(lambda: self.http.post(f"/fine_tuning/jobs/{job}/cancel").status_code in (200, 409), "cancelling")

    # -- observations of a job ---------------------------------------------------------------------------------

    def row(self, job: str) -> Job:
        """The job's row, read past all proxies."""
        with self.cluster.services.database.read() as session:
            return session.get_one(Job, job)

    def wait_end(self, job: str, seconds: float = 240) -> Job:
        wait_until(lambda: self.row(job).status not in ACTIVE, f"the end of {job}")
        return self.row(job)

    def started(self, job: str, number: int | None = None, seconds: float = 90) -> Attempt | None:
        """The attempt `number` of a job, or any, once its trainer runs."""

        def matches(line: Line) -> bool:
            return line.get("event") == "trainer started" and line["job"] == job and number in (None, line["attempt"])

        line = self.cluster.logs.wait(matches, self.requested_at[job], seconds)
        return None if line is None else Attempt(job, line["attempt"], line["program"], line["pid"], line["seen_at"])

    def messages(self, job: str) -> list[str]:
        with self.cluster.services.database.read() as session:
            statement = select(JobEvent.message).where(JobEvent.job_id == job).order_by(JobEvent.sequence)
            return list(session.scalars(statement))

    def result(self, job: str) -> Result:
        """Hashes of the artifacts of a job that has succeeded."""
        row, storage = self.row(job), self.cluster.services.storage
        with self.cluster.services.database.read() as session:
            model = session.scalars(select(Model).where(Model.job_id == job)).one()
            file = session.get_one(File, row.result_files[0])
        adapter = hashlib.sha256(storage.read(f"{model.prefix}/adapter_model.safetensors")).hexdigest()
        table = csv.DictReader(io.StringIO(storage.read(file.key).decode()))
        stable_rows = [{name: value for name, value in line.items() if name not in TIME_DEPENDENT} for line in table]
        return Result(adapter, hashlib.sha256(json.dumps(stable_rows).encode()).hexdigest())

    # -- checks ------------------------------------------------------------------------------------------------

    def check(self, job: str, status: str = "succeeded") -> None:
        """Check that a job has ended once, with `status` and with the bytes of an undisturbed run."""
        row = self.wait_end(job)
        if row.status != status:
            self.problems.append(f"{job} ended as {row.status}, not {status}: {row.error}")
        endings = [message for message in self.messages(job) if message.startswith("The job has succeeded")]
        with self.cluster.services.database.read() as session:
            models = session.scalar(select(func.count()).select_from(Model).where(Model.job_id == job))
        expected_count = int(status == "succeeded")
        if len(endings) != expected_count or models != expected_count:
            self.problems.append(f"{job} succeeded {len(endings)} times and made {models} models")
        if row.status == "succeeded" and self.result(job) != self.expected[self.kinds[job]]:
            self.problems.append(f"{job} made other bytes than an undisturbed run")

    def check_all(self) -> dict[str, int]:
        """Check the total-queue invariant, and that no object is missing, incomplete or left over. Returns the counts.

        Call it after all disturbances.
        """
        services = self.cluster.services
        for job in self.accepted:
            self.wait_end(job)
        with services.database.read() as session:
            states = Counter(session.scalars(select(Job.status)))
            job_ids = set(session.scalars(select(Job.id)))
            folders = [model.prefix for model in session.scalars(select(Model)) if model.prefix]
            folders += [f"{checkpoint.prefix}/model" for checkpoint in session.scalars(select(Checkpoint))]
            keys = [file.key for file in session.scalars(select(File).where(File.deleted_at.is_(None)))]
        lost, extra = set(self.accepted) - job_ids, job_ids - set(self.accepted)
        if len(self.accepted) != len(set(self.accepted)) or extra:
            self.problems.append(f"made twice: {sorted(extra)}")
        if lost:
            self.problems.append(f"lost: {sorted(lost)}")
        if sum(states[end] for end in ("succeeded", "failed", "cancelled")) != len(self.accepted):
            self.problems.append(f"{len(self.accepted)} accepted, but {dict(states)}")
        _, pruned = prune(services, delete=True, min_age=0.0)
        _, left_over = prune(services, delete=False, min_age=0.0)
        if left_over:
            self.problems.append(f"{left_over} objects that pruning does not remove")
        for folder in folders:
            names = {key.rpartition("/")[2] for key, _size in services.storage.list(folder)}
            if not {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names:
                self.problems.append(f"half an artifact: {folder} holds {sorted(names)}")
        for key in keys:
            services.storage.read(key)
        return {"accepted": len(self.accepted), "left_over_objects": pruned} | dict(states)


def orphans(home: Path) -> list[int]:
    """Processes that outlived the cluster of the folder `home`, which has ended."""
    deadline = time.monotonic() + 10
    while (pids := processes(home)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return pids
