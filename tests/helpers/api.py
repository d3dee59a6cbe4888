"""Requests to the API in this process or on a port, and counts of rows and objects."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import func, select

from app.files.tables import File
from app.jobs.tables import Job
from app.keys.schemas import KeySpec, Scope
from app.main import Server, create_app
from app.projects.schemas import ProjectSpec
from app.services import Services
from app.settings import Settings
from tests.helpers.servers import CEILING, free_port, wait_until

ROW = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


def upload(client: TestClient, content: bytes = ROW, **form: str) -> str:
    answer = client.post("/v1/files", files={"file": ("p.jsonl", content)}, data={"purpose": "fine-tune", **form})
    assert answer.status_code == 200, answer.text
    file_id: str = answer.json()["id"]
    return file_id


def error_of(answer: Response, status: int) -> dict[str, Any]:
    """The error of `answer`. Checks the status, and that the answer has exactly the contract's shape."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def key_of(services: Services, project: str, *scopes: Scope) -> str:
    """A new key of `project`, which is created if it is missing."""
    if all(existing.id != project for existing in services.projects.list()):
        services.projects.create(ProjectSpec(id=project))
    return services.keys.create(KeySpec(name="test", project=project, scopes=list(scopes or Scope))).key


def rows(services: Services) -> tuple[int, int]:
    """The number of files and of jobs in the database."""
    with services.database.read() as session:
        counts = [session.scalars(select(func.count()).select_from(table)).one() for table in (File, Job)]
    return counts[0], counts[1]


def objects(services: Services) -> int:
    """The number of stored files."""
    return len(services.storage.list("files"))


@contextmanager
def served(settings: Settings, **changes: int) -> Iterator[tuple[Server, threading.Thread, httpx2.Client]]:
    """A server with changed settings, the thread that it runs in, and a client."""
    settings = settings.model_copy(update={"port": free_port(), **changes})
    server = Server(create_app(settings), settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    headers = {"Authorization": f"Bearer {settings.admin_key}"}
    with httpx2.Client(base_url=f"http://127.0.0.1:{settings.port}", headers=headers, timeout=CEILING) as client:
        try:
            wait_until(lambda: server.started, "the server")
            yield server, thread, client
        finally:
            server.should_exit = True
            thread.join(CEILING)
