"""A worker that drains gives its work back, whatever hangs: the object store, the trainer, the device.

An object that hangs is a pipe without a writer, and a process that hangs is stopped by SIGSTOP.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.broker import Lane
from app.derived_artifacts import repository as artifacts
from app.jobs import queue as job_queue
from app.jobs.states import Status
from app.jobs.tables import Job
from app.services import Services
from app.spec.job import JobSpec
from tests.helpers.api import upload
from tests.helpers.jobs import claim, get, make_job
from tests.helpers.preferences import pairs, write
from tests.helpers.reader import READER
from tests.helpers.tiny_model import make_tiny_model
from worker import device_health, worker_pool
from worker.base_models import BaseModels
from worker.derived_artifacts import make_artifact
from worker.device_health import DeviceHealth
from worker.lease import AskedToStop
from worker.processes import Child, ForkServer
from worker.training_run import Training
from worker.validator import validate
from worker.waiting import THREAD_NAME, Check
from worker.worker_pool import WorkerPool

Work = Callable[[threading.Event], None]


@pytest.fixture
def hanging_file(client: TestClient, services: Services) -> Iterator[str]:
    """The id of a file whose download never begins."""
    file_id = upload(client)
    path = services.settings.home / "objects" / "files" / file_id
    path.unlink()
    os.mkfifo(path)
    before = set(threading.enumerate())
    yield file_id
    writer = os.open(path, os.O_RDWR)  # lets the threads that were left alone go on
    for thread in set(threading.enumerate()) - before:
        if thread.name == THREAD_NAME:
            os.write(writer, b"x")
            thread.join()
    os.close(writer)


def drains(work: Work) -> None:
    """Do `work` in a thread, and drain it once it reads. The thread must end, though its download does not."""
    stopping = threading.Event()
    thread = threading.Thread(target=work, args=(stopping,))
    thread.start()
    thread.join(1)
    assert thread.is_alive()
    stopping.set()
    thread.join(60)
    assert not thread.is_alive()


def test_a_training_is_given_back(services: Services, hanging_file: str) -> None:
    job_id = make_job(services, training_file=hanging_file)
    with services.database.write() as session:
        row = session.get_one(Job, job_id)
        row.spec = row.spec | {"training_file": hanging_file}
    job, base_models = claim(services), BaseModels(services.settings)
    assert job is not None
    drains(lambda stopping: Training(services, base_models, job, stopping, ForkServer(), DeviceHealth("cpu")).run())
    row = get(services, job_id)
    assert (row.status, row.lost_attempts, row.lease_owner) == (Status.QUEUED, 0, None)
    assert claim(services) is not None


def test_the_check_of_a_jobs_files_is_given_back(client: TestClient, services: Services, hanging_file: str) -> None:
    body = {"model": "tiny", "training_file": hanging_file}
    job_id = client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
    with services.database.write() as session:
        job = job_queue.claim(session, Status.VALIDATING, "test")
    assert job is not None
    drains(lambda stopping: validate(services, BaseModels(services.settings), READER, job, stopping))
    row = get(services, job_id)
    assert (row.status, row.lost_attempts, row.lease_owner) == (Status.VALIDATING, 0, None)
    with services.database.write() as session:
        assert job_queue.claim(session, Status.VALIDATING, "test") is not None


def test_a_report_is_given_back(client: TestClient, services: Services, hanging_file: str) -> None:
    assert client.get(f"/v1/files/{hanging_file}/report").json()["status"] == "pending"
    with services.database.write() as session:
        artifact = artifacts.claim(session, "test", [])
    assert artifact is not None
    drains(lambda stopping: make_artifact(services, BaseModels(services.settings), READER, artifact, stopping))
    with services.database.write() as session:
        again = artifacts.claim(session, "test", [])
    assert again is not None and (again.id, again.lost_attempts) == (artifact.id, 0)


class FrozenServer(ForkServer):
    """A fork server that stands still before it can start a trainer."""

    def prepare(self) -> None:
        super().prepare()
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)


class ServerOfFrozenTrainers(ForkServer):
    """Its trainers stand still as soon as they are started. They write no checkpoint."""

    def start(self, folder: Path, check: Check = lambda: None, *, memory_bytes: int | None = None) -> Child:
        trainer = super().start(folder, check, memory_bytes=memory_bytes)
        os.kill(trainer.pid, signal.SIGSTOP)
        return trainer


@pytest.fixture
def job_to_train(client: TestClient, services: Services, tmp_path: Path) -> str:
    """The id of a queued job that a trainer on this machine can run."""
    make_tiny_model(services.settings.models_dir / "tiny")
    file_id = upload(client, write(tmp_path / "pairs.jsonl", pairs(12, seed=1)).read_bytes())
    spec = JobSpec(model="tiny", training_file=file_id).resolved().model_dump(mode="json")
    return make_job(services, training_file=file_id, spec=spec)


@pytest.mark.parametrize("kind", [FrozenServer, ServerOfFrozenTrainers])
def test_a_job_whose_trainer_hangs_is_given_back(
    services: Services, job_to_train: str, monkeypatch: pytest.MonkeyPatch, kind: type[ForkServer]
) -> None:
    monkeypatch.setattr("worker.runner.DRAIN_SECONDS", 0.5)
    job, server = claim(services), kind()
    assert job is not None
    base_models, health = BaseModels(services.settings), DeviceHealth("cpu")
    try:
        drains(lambda stopping: Training(services, base_models, job, stopping, server, health).run())
    finally:
        server.close()
    row = get(services, job_to_train)
    assert (row.status, row.lost_attempts, row.lease_owner) == (Status.QUEUED, 0, None)
    assert claim(services) is not None


def test_a_check_of_the_device_ends_with_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check hangs, as on a broken GPU. Its process is killed."""
    program = ["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 600"]
    monkeypatch.setattr(device_health, "command", lambda *_: program)
    ended = threading.Event()

    def work(stopping: threading.Event) -> None:
        def check() -> None:
            if stopping.is_set():
                raise AskedToStop

        with pytest.raises(AskedToStop):
            DeviceHealth("cpu", check=check).failed("a broken memory")
        ended.set()

    drains(work)
    assert ended.is_set()
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_a_worker_ends_though_its_work_hangs(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "WORK_SECONDS", 0.2)
    pool, let_go = WorkerPool(services, Lane.CPU), threading.Event()
    began = threading.Event()

    def hangs() -> bool:
        began.set()
        return let_go.wait(600) and False

    monkeypatch.setattr(pool, "_work_once", hangs)
    pool.start()
    began.wait()
    pool.stop()
    pool.join()
    assert pool._threads[0].is_alive()
    let_go.set()
    pool._threads[0].join()
