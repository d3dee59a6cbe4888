"""A worker that doubts its device: a GPU that is lost, one that fails in the backward pass, one that does not answer.

No GPU is needed. The worker is told of one that torch cannot find, or each backward pass raises a GPU's error.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.helpers.broken_devices import BROKEN, breakable
from tests.helpers.preferences import pairs, write
from tests.helpers.service import Running, create_job, job_body, running, upload


def write_driver(folder: Path, answer: str) -> Path:
    """A program `nvidia-smi` that prints `answer`. Returns its folder."""
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\necho '{answer}'\n")
    program.chmod(0o755)
    return program.parent


def fake_driver(folder: Path, answer: str) -> dict[str, str]:
    """The environment of a worker that wants a GPU, whose `nvidia-smi` prints `answer`."""
    path = write_driver(folder, answer)
    return {"DPO_DEVICE": "cuda", "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}


@contextmanager
def another_worker(service: Running) -> Iterator[None]:
    """A second GPU worker of the same service, on another machine: it trains on its CPU."""
    command = [sys.executable, "-m", "app.cli.main", "worker", "--lane", "gpu"]
    environment = service.environment | {"DPO_DEVICE": "cpu", "PATH": os.environ["PATH"]}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def out_of_service(service: Running) -> bool:
    """Whether the service says that its worker is out of service: in /readyz, which stays ok, and in its metrics."""
    with service.http() as client:
        ready = client.get(service.url.replace("/v1", "/readyz"))
        metrics = client.get(service.url.replace("/v1", "/metrics")).text
    assert ready.status_code == 200 and ready.json()["status"] == "ok"
    warned = "1 of 1 GPU workers are out of service" in ready.json()["warnings"].get("workers", "")
    assert not warned or "dpo_workers_out_of_service 1.0" in metrics
    return warned


def events(service: Running, job_id: str) -> str:
    """The messages of a job, newest first."""
    listed = service.openai().fine_tuning.jobs.list_events(job_id, limit=100).data
    return "\n".join(event.message for event in listed)


def start(service: Running, folder: Path, **changes: Any) -> str:
    """A short job on uploaded pairs."""
    file = upload(service, write(folder / "pairs.jsonl", pairs(24, seed=1)), "fine-tune")
    with service.http() as client:
        return create_job(client, **job_body(file, hyperparameters={"max_steps": 5}, **changes))


def test_a_worker_that_has_lost_its_gpu_trains_nothing_and_another_takes_its_job(home: Path, tmp_path: Path) -> None:
    """The driver shows an H100 and torch does not find it, as in a container that has lost its card.

    Later the driver does not answer either. The worker looks again, and says so.
    """
    with running(home, fake_driver(tmp_path, "GPU-1, NVIDIA H100 80GB HBM3, 81559")) as service:
        job_id = start(service, tmp_path)
        service.until(lambda: out_of_service(service), "the worker's end of service")
        assert service.job(job_id)["status"] == "queued"
        assert "out of service (torch finds no usable GPU" in events(service, job_id)
        assert service.job(job_id)["waiting_for"] == "a GPU worker whose device works: it is out of service"
        write_driver(tmp_path, "Failed to initialize NVML: Unknown Error")
        with another_worker(service):
            service.wait_for(job_id, lambda job: job["status"] == "succeeded")
        assert "on cpu" in events(service, job_id)
        log = home / "serve.log"
        service.until(lambda: "'nvidia-smi' shows no GPU: Failed to initialize NVML" in log.read_text(), "another look")


def test_a_machine_that_cannot_train_fails_no_job_and_trains_again_once_it_works(home: Path, tmp_path: Path) -> None:
    """Jobs wait for a broken machine. It takes one of them, and is out of service until a check passes."""
    first = next(iter(BROKEN))
    (tmp_path / first).touch()  # before the worker loads torch
    with running(home, breakable(tmp_path)) as service:
        for name, (_, error) in BROKEN.items():
            (tmp_path / name).touch()
            jobs = [start(service, tmp_path) for _ in range(2)]
            service.until(lambda: out_of_service(service), f"the worker's end of service by {name}")
            checked = partial(lambda jobs: {service.job(job)["status"] for job in jobs} == {"queued"}, jobs)
            service.until(checked, "the check of all files")
            started = [job for job in jobs if "Fine-tuning job started" in events(service, job)]
            assert len(started) == 1 and error in events(service, started[0]), name
            (tmp_path / name).unlink()
            for job_id in jobs:
                service.wait_for(job_id, lambda job: job["status"] == "succeeded")
            assert not out_of_service(service)
