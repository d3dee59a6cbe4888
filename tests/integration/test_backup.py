"""The backup of docs/deployment.md: a dump and a copy of the objects restore the service."""

import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastapi.testclient import TestClient

from app.database import database_now
from app.jobs import events as job_events
from app.jobs import queue as job_queue
from app.jobs.states import Status
from app.main import create_app
from app.migrate import migrate
from app.models.tables import Model
from app.prune import prune
from app.services import Services
from app.settings import Settings
from tests.helpers.api import upload
from tests.helpers.servers import admin, postgres_program

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
