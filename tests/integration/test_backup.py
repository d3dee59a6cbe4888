"""The backup of docs/deployment.md: a dump and a copy of the objects restore the service."""

import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update
from typer.testing import CliRunner

from app import fsck
from app.broker import Lane
from app.cli.main import cli
from app.database import database_now
from app.jobs import checkpoints as job_checkpoints
from app.jobs import events as job_events
from app.jobs import queue as job_queue
from app.jobs.states import Status
from app.jobs.tables import Checkpoint, Job
from app.main import create_app
from app.migrate import migrate
from app.models.tables import Model
from app.operations.schemas import OperationsChange
from app.operations.service import may_claim
from app.prune import prune
from app.services import Services
from app.settings import Settings
from app.stored_content import store_folder
from app.webhooks import repository as webhooks
from app.webhooks.schemas import EndpointSpec
from tests.helpers.api import error_of, upload
from tests.helpers.jobs import claim, expire, make_job
from tests.helpers.servers import admin, postgres_program
from worker.housekeeping import purge_deleted_files
from worker.reaper import reap
from worker.webhooks import Sender
from worker.worker_pool import WorkerPool

PATHS = (
    "files",
    "fine_tuning/jobs",
    "models",
    "webhooks",
    "keys",
    "projects",
)


def test_a_dump_and_a_copy_of_the_objects_restore_the_service(
    client: TestClient, services: Services, settings: Settings, tmp_path: Path
) -> None:
    file_id = upload(client)
    job_id = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id}).json()["id"]
    key = client.post("/v1/keys", json={"name": "kept"}).json()["key"]
    prefix = f"jobs/{job_id}/attempt-2/model"
    services.storage.put_bytes(f"{prefix}/adapter_model.safetensors", b"weights")
    with services.database.write() as session:
        job_events.add(session, job_id, "told")
        session.add(
            Model(
                name="ft:tiny:default::x", kind="adapter", project="default", created_at=database_now(), bytes=7,
                base_model="tiny", job_id=job_id, prefix=prefix, details={},
            )
        )  # fmt: skip
    state_before = api_state(client, file_id, job_id)
    dump = tmp_path / "backup"
    dump.mkdir()
    back_up(settings, dump)
    late_file = upload(client)  # made after the dump: only its object is restored, and pruning deletes it
    shutil.copytree(settings.home / "objects", dump / "objects")
    for name in ("admin.key", "secret.key"):
        shutil.copy(settings.home / name, dump)

    with (
        restored(settings, dump, tmp_path / "again") as restored_services,
        open_client(restored_services) as restored_client,
    ):
        assert api_state(restored_client, file_id, job_id) == state_before
        assert restored_client.get(f"/v1/files/{late_file}").status_code == 404
        assert restored_client.get("/v1/files", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        with restored_services.database.write() as session:
            claimed = job_queue.claim(session, Status.VALIDATING, "a worker")
        assert claimed is not None and claimed.id == job_id, "unfinished jobs go on in the restored service"
        assert prune(restored_services, delete=True, min_age=0.0)[1] == 1


def api_state(client: TestClient, file_id: str, job_id: str) -> list[object]:
    """All that the API shows, and its downloads."""
    answers: list[object] = [client.get(f"/v1/{path}").json() for path in PATHS]
    answers += [
        client.get(f"/v1/fine_tuning/jobs/{job_id}/events").json(),
        client.get(f"/v1/files/{file_id}/content").content,
    ]
    return [*answers, client.get("/v1/models/ft:tiny:default::x/download").content]


def back_up(settings: Settings, dump: Path) -> None:
    """Dump the database while the service runs."""
    if settings.database_url.startswith("sqlite"):
        with sqlite3.connect(settings.database_url.removeprefix("sqlite:///")) as connection:
            connection.execute("VACUUM INTO ?", [str(dump / "dpo.sqlite3")])
        connection.close()
    else:
        url = settings.database_url.replace("+psycopg", "")
        command = [postgres_program("pg_dump"), "--no-owner", "--file", str(dump / "dpo.sql"), url]
        subprocess.run(command, check=True)


@contextmanager
def restored(settings: Settings, dump: Path, home: Path) -> Iterator[Services]:
    """The service on another machine, restored from the backup alone."""
    shutil.copytree(dump, home)
    url = f"sqlite:///{home}/dpo.sqlite3"
    if not settings.database_url.startswith("sqlite"):
        url = settings.database_url + "_again"
        admin(settings.database_url, f"CREATE DATABASE {url.rpartition('/')[2]}")
        libpq_url = url.replace("+psycopg", "")
        command = [
            postgres_program("psql"),
            "--quiet",
            "--set",
            "ON_ERROR_STOP=1",
            "--file",
            str(dump / "dpo.sql"),
            libpq_url,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    services = Services.of(Settings(home=home, database_url=url))
    migrate(services.database)
    yield services
    services.database.close()


def open_client(services: Services) -> TestClient:
    settings = services.settings
    return TestClient(
        create_app(settings), "http://localhost", headers={"Authorization": f"Bearer {settings.admin_key}"}
    )


def copied(settings: Settings, dump: Path) -> Path:
    """Copy the objects and the keys beside a dump."""
    shutil.copytree(settings.home / "objects", dump / "objects")
    for name in ("admin.key", "secret.key"):
        shutil.copy(settings.home / name, dump)
    return dump


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    folder = tmp_path / "backup"
    folder.mkdir()
    return folder


def test_a_copy_that_is_made_while_nothing_changes_waits_until_it_is_let_go(
    client: TestClient, services: Services, settings: Settings, tmp_path: Path, dump: Path
) -> None:
    """The procedure of docs/deployment.md for a move: nothing trains in both places, no webhook is sent from both."""
    endpoint = services.webhooks.create("default", EndpointSpec(url="https://1.1.1.1/hook"))
    body = {"model": "tiny", "training_file": upload(client)}
    job_id = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    with services.database.write() as session:
        webhooks.enqueue(session, "default", "fine_tuning.job.succeeded", {"id": "ftjob-x"})
    services.operations.change(OperationsChange(read_only="the service moves"))
    back_up(settings, dump)
    with restored(settings, copied(settings, dump), tmp_path / "again") as copy:
        pool = WorkerPool(copy, Lane.CPU)
        for _ in range(2):
            assert not pool._work_once()
            assert Sender(copy, threading.Event(), "test").send_due() == 0
        assert list(fsck.check(copy, content=True)) == []
        copy.operations.change(OperationsChange(read_only=None))
        with copy.database.write() as session:
            claimed = job_queue.claim(session, Status.VALIDATING, "test")
            due = webhooks.claim(session, "test")
        assert claimed is not None and (claimed.id, claimed.attempt) == (job_id, 1)
        assert due is not None and due[1].id == endpoint.id
    with services.database.read() as session:
        assert not may_claim(session, "any worker"), "the first place goes on doing nothing"


def test_an_old_dump_beside_newer_objects_is_mended(
    client: TestClient, services: Services, settings: Settings, tmp_path: Path, dump: Path
) -> None:
    """After the dump, a job went on, files and models were deleted, and webhooks were sent."""
    kept, deleted = upload(client), upload(client)
    services.webhooks.create("default", EndpointSpec(url="https://1.1.1.1/hook"))
    job_id = make_job(services, name="went-on")
    assert claim(services) is not None
    folder = tmp_path / "content"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text("weights")
    with services.database.write() as session:
        for step in (1, 2):
            prefix = f"jobs/{job_id}/attempt-1/checkpoints/{step}"
            content = store_folder(services.storage, f"{prefix}/model", folder)
            session.add(
                Checkpoint(
                    id=f"ftckpt-{step}", job_id=job_id, project="default", created_at=database_now(), stage="dpo",
                    step_number=step, metrics={}, model_name=f"ft:ckpt-{step}", prefix=prefix, content_of=prefix,
                    **content.as_columns(),
                )
            )  # fmt: skip
        for name in ("kept", "deleted", "damaged"):
            content = store_folder(services.storage, f"jobs/{name}/attempt-1/model", folder)
            session.add(
                Model(
                    name=f"ft:{name}", kind="adapter", project="default", created_at=database_now(), base_model="tiny",
                    prefix=f"jobs/{name}/attempt-1/model", details={}, **content.as_columns(),
                )
            )  # fmt: skip
        webhooks.enqueue(session, "default", "fine_tuning.job.succeeded", {"id": "ftjob-x"})
    back_up(settings, dump)

    services.files.delete("default", deleted)
    purge_deleted_files(services)
    services.storage.delete_folder("jobs/deleted/attempt-1/model")
    services.storage.put_bytes("jobs/damaged/attempt-1/model/adapter_model.safetensors", b"WEIGHTS")
    services.storage.delete_folder(f"jobs/{job_id}/attempt-1/checkpoints/1")
    services.storage.put_bytes(f"jobs/{job_id}/attempt-3/checkpoints/9/model/adapter_model.safetensors", b"later")
    with restored(settings, copied(settings, dump), tmp_path / "again") as copy:
        wrong = {("file", deleted), ("model", "ft:deleted"), ("checkpoint", "ft:ckpt-1"), ("job", job_id)}
        assert {(finding.kind, finding.name) for finding in fsck.check(copy)} == wrong
        findings = list(fsck.check(copy, content=True))
        assert {(finding.kind, finding.name) for finding in findings} == wrong | {("model", "ft:damaged")}
        for finding in findings:
            fsck.repair(copy, finding)
        assert fsck.drop_webhooks(copy) == 1
        assert list(fsck.check(copy, content=True)) == []
        assert Sender(copy, threading.Event(), "test").send_due() == 0, "it was sent before the loss"
        expire(copy, job_id)
        reap(copy.database)
        with copy.database.write() as session:
            session.execute(update(Job).where(Job.id == job_id).values(eligible_at=0.0))
        again = claim(copy)
        assert again is not None and again.attempt == 4, "it writes beside what the lost attempts have left"
        with copy.database.read() as session:
            last = job_checkpoints.last(session, job_id)
        assert last is not None and last.step_number == 2, "the right start"
        assert copy.files.get("default", kept).id == kept
        assert copy.models.get("default", "ft:kept").name == "ft:kept"


def test_the_command_tells_what_is_wrong_and_mends_it(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_id = upload(client)
    monkeypatch.setattr("app.cli.fsck.local", lambda: services)
    run = CliRunner()
    assert run.invoke(cli, ["fsck"]).exit_code == 0
    services.storage.delete(f"files/{file_id}")
    told = run.invoke(cli, ["fsck"])
    assert told.exit_code == 1 and f"file {file_id} has no content in the object store" in told.output
    mended = run.invoke(cli, ["fsck", "--repair", "--json"])
    assert mended.exit_code == 0 and file_id in mended.output
    assert run.invoke(cli, ["fsck"]).exit_code == 0
    error_of(client.get(f"/v1/files/{file_id}"), 404)
