"""Uploads are read in a process with limits. A file that costs too much ends one check, and no worker."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.derived_artifacts import repository as artifacts
from app.derived_artifacts.tables import DerivedArtifact
from app.jobs.states import Status
from app.jobs.tables import Job
from app.projects.tables import Project
from app.services import Services
from tests.helpers.api import upload
from tests.helpers.jobs import check_files, get
from tests.helpers.preferences import pairs
from tests.helpers.servers import wait_until
from worker.base_models import BaseModels
from worker.derived_artifacts import make_artifact
from worker.processes import Child
from worker.reader import client as reader_client
from worker.reader.client import Reader
from worker.waiting import THREAD_NAME, always_wanted
from worker.worker_pool import WorkerPool

ROWS = "".join(json.dumps(row) + "\n" for row in pairs(2000, seed=1)).encode()


@pytest.fixture
def reader() -> Iterator[Reader]:
    """A reader of the test's own, whose limits it may change."""
    reader = Reader()
    yield reader
    reader.close()


@pytest.fixture(params=["memory", "time"])
def miserly(request: pytest.FixtureRequest, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """A reader that has too little for any file."""
    if request.param == "memory":
        reader.memory_bytes = 1
    else:
        monkeypatch.setattr(reader_client, "LEAST_SECONDS", 0.0)
        monkeypatch.setattr(reader_client, "BYTES_PER_SECOND", 1e12)
    return reader


def test_a_file_that_costs_too_much_fails_the_job_that_reads_it(
    client: TestClient, services: Services, miserly: Reader
) -> None:
    body = {"model": "tiny", "training_file": upload(client, ROWS)}
    job_id = client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
    check_files(services, miserly)
    error = get(services, job_id).error
    assert error is not None and (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert error["message"].startswith("It takes ") and error["message"].endswith(reader_client.ADVICE)


def test_a_file_that_costs_too_much_fails_its_report(client: TestClient, services: Services, miserly: Reader) -> None:
    file_id = upload(client, ROWS)
    with services.database.write() as session:
        artifact = artifacts.claim(session, "test", [])
    assert artifact is not None
    make_artifact(services, BaseModels(services.settings), miserly, artifact, threading.Event())
    answer = client.get(f"/v1/files/{file_id}/report")
    assert answer.json()["error"]["code"] == "file_too_costly", answer.text


def test_a_reader_that_is_killed_fails_no_file(reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt is repeated: the file may be good."""
    (tmp_path / "dataset").write_bytes(ROWS)
    start = reader._server.start

    def killed(*arguments: object, **more: object) -> Child:
        child = start(*arguments, **more)  # type: ignore[arg-type]
        os.kill(child.pid, signal.SIGKILL)
        return child

    task = {"name": "survey", "dataset": str(tmp_path / "dataset"), "mapping": None}
    assert reader.do(tmp_path, task, len(ROWS), always_wanted)["kept"] == 2000
    monkeypatch.setattr(reader._server, "start", killed)
    with pytest.raises(RuntimeError):
        reader.do(tmp_path, task, len(ROWS), always_wanted)


def test_several_threads_use_one_reader(reader: Reader, tmp_path: Path) -> None:
    kept: dict[int, int] = {}

    def read(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "dataset").write_bytes(b"".join(ROWS.splitlines(keepends=True)[: number + 1]))
        task = {"name": "survey", "dataset": str(folder / "dataset"), "mapping": None}
        kept[number] = reader.do(folder, task, 1000, always_wanted)["kept"]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept == {number: number + 1 for number in range(12)}


def test_a_task_that_is_not_wanted_any_more_ends_with_its_process(reader: Reader, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "dataset")  # nobody ever writes into it
    children: list[Child] = []
    start, deadline = reader._server.start, time.monotonic() + 1

    def noted(*arguments: object, **more: object) -> Child:
        children.append(start(*arguments, **more))  # type: ignore[arg-type]
        return children[0]

    reader._server.start = noted  # type: ignore[method-assign]

    def check() -> None:
        if children and time.monotonic() > deadline:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        reader.do(tmp_path, {"name": "survey", "dataset": str(tmp_path / "dataset"), "mapping": None}, 0, check)
    wait_until(lambda: not Path(f"/proc/{children[0].pid}").exists(), "the end of the reader's process")


def test_a_project_whose_work_hangs_holds_one_place_and_delays_no_other(
    client: TestClient, services: Services, cpu_worker: WorkerPool
) -> None:
    """Its downloads are pipes that nobody writes to."""
    with services.database.write() as session:
        for project in ("slow", "quick"):
            session.add(Project(id=project, created_at=0.0))
    files = {}
    for project in ("slow", "quick"):
        key = client.post("/v1/keys", json={"name": project, "project": project}).raise_for_status().json()["key"]
        headers = {"Authorization": f"Bearer {key}"}
        for number in range(3):
            answer = client.post(
                "/v1/files", files={"file": ("p.jsonl", ROWS)}, data={"purpose": "fine-tune"}, headers=headers
            )
            files[project, number] = answer.raise_for_status().json()["id"]
            body = {"model": "tiny", "training_file": files[project, number]}
            client.post("/v1/fine_tuning/jobs", json=body, headers=headers).raise_for_status()
    pipes = [services.settings.home / "objects" / "files" / files["slow", number] for number in range(3)]
    for pipe in pipes:
        pipe.unlink()
        os.mkfifo(pipe)

    def unfinished(project: str) -> tuple[int, int]:
        """(jobs to be checked, artifacts to be made)"""
        with services.database.read() as session:
            jobs = session.scalars(select(Job).where(Job.project == project, Job.status == Status.VALIDATING)).all()
            pending = select(DerivedArtifact).where(
                DerivedArtifact.project == project, DerivedArtifact.status == "pending"
            )
            return len(jobs), len(session.scalars(pending).all())

    def quick_is_done() -> bool:
        while cpu_worker._work_once():
            assert len([work for work in cpu_worker._in_hand.values() if work.project == "slow"]) <= 1
        return unfinished("quick") == (0, 0)

    wait_until(quick_is_done, "the work of the other project")
    assert unfinished("slow") == (3, 3)
    assert [work.project for work in list(cpu_worker._in_hand.values())].count("slow") == 1
    cpu_worker.stop()
    writers = [os.open(pipe, os.O_RDWR) for pipe in pipes]  # lets the download go on that was left alone
    for writer in writers:
        os.write(writer, b"x")
    wait_until(lambda: not any(thread.name == THREAD_NAME for thread in threading.enumerate()), "the download's end")
    for writer in writers:
        os.close(writer)
