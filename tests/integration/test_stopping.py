"""A worker that drains gives its work back, though the object store hangs. Here an object is a pipe without a writer."""

import os
import threading
from collections.abc import Callable, Iterator

import pytest
from fastapi.testclient import TestClient

from app.derived_artifacts import repository as artifacts
from app.jobs import queue as job_queue
from app.jobs.states import Status
from app.jobs.tables import Job
from app.services import Services
from tests.helpers.api import upload
from tests.helpers.jobs import claim, get, make_job
from worker.base_models import BaseModels
from worker.derived_artifacts import make_artifact
from worker.device_health import DeviceHealth
from worker.processes import ForkServer
from worker.training_run import Training
from worker.validator import validate
from worker.waiting import THREAD_NAME

Work = Callable[[threading.Event], None]


@pytest.fixture
def hanging_file(client: TestClient, services: Services) -> Iterator[str]:
    """The id of a file whose download never begins."""
    file_id = upload(client)
    path = services.settings.home / "objects" / "files" / file_id
    path.unlink()
    os.mkfifo(path)
    yield file_id
    writer = os.open(path, os.O_RDWR)  # lets the threads that were left alone go on
    for thread in threading.enumerate():
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
    drains(lambda stopping: validate(services, BaseModels(services.settings), job, stopping))
    row = get(services, job_id)
    assert (row.status, row.lost_attempts, row.lease_owner) == (Status.VALIDATING, 0, None)
    with services.database.write() as session:
        assert job_queue.claim(session, Status.VALIDATING, "test") is not None


def test_a_report_is_given_back(client: TestClient, services: Services, hanging_file: str) -> None:
    assert client.get(f"/v1/files/{hanging_file}/report").json()["status"] == "pending"
    with services.database.write() as session:
        artifact = artifacts.claim(session, "test", [])
    assert artifact is not None
    drains(lambda stopping: make_artifact(services, BaseModels(services.settings), artifact, stopping))
    with services.database.write() as session:
        again = artifacts.claim(session, "test", [])
    assert again is not None and (again.id, again.lost_attempts) == (artifact.id, 0)
