"""A project stores no more than its limit, at any moment, and all that it stores counts."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import select, update

from app import counted_objects
from app.database import database_now
from app.keys.schemas import Scope
from app.models import repository as models
from app.models.tables import Model
from app.projects import repository as projects
from app.projects import reservations
from app.projects.schemas import Limits
from app.projects.tables import Project, Reservation
from app.prune import prune
from app.services import Services
from app.settings import Settings
from app.uploads import service as uploads
from tests.helpers.api import error_of, key_of, served
from worker.housekeeping import expire


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


MEGABYTE = 1_000_000


def limited(services: Services, bytes_: int) -> dict[str, str]:
    """The headers of a key of a project that may store so many bytes."""
    key = key_of(services, "search")
    services.projects.limit("search", Limits(max_storage_bytes=bytes_))
    return bearer(key)


def stored_bytes(services: Services) -> int:
    return sum(size for prefix in ("files", "uploads") for _, size in services.storage.list(prefix))


def used(services: Services) -> int:
    with services.database.read() as session:
        return projects.storage_bytes(session, "search")


@pytest.mark.parametrize("announced", [True, False], ids=["of announced size", "of unknown size"])
def test_parallel_uploads_never_store_more_than_the_limit(
    services: Services, settings: Settings, monkeypatch: pytest.MonkeyPatch, announced: bool
) -> None:
    """Eight uploads of 3 MB at once, into room for 4 MB."""
    monkeypatch.setattr(reservations, "STEP_BYTES", MEGABYTE)
    headers, received = limited(services, 4 * MEGABYTE), list[int]()
    body = (
        b'--xx\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--xx\r\n'
        b'Content-Disposition: form-data; name="file"; filename="p.jsonl"\r\n\r\n'
        + b"x" * 3 * MEGABYTE
        + b"\r\n--xx--\r\n"
    )
    headers |= {"Content-Type": "multipart/form-data; boundary=xx"}

    def send(http: httpx2.Client) -> int:
        pieces = (body[start : start + 200_000] for start in range(0, len(body), 200_000))
        content = body if announced else pieces
        return http.post("/v1/files", content=content, headers=headers).status_code

    with served(settings) as (_, _, http), ThreadPoolExecutor(8) as threads:
        received += threads.map(lambda _: send(http), range(8))
        assert set(received) <= {200, 403} and received.count(200) <= 1
        if announced:  # otherwise each may take a part of the room, and none get all that it needs
            assert received.count(200) == 1
        assert stored_bytes(services) == 3 * MEGABYTE * received.count(200) == used(services)


def test_a_body_that_is_too_large_is_refused_before_it_comes(client: TestClient, services: Services) -> None:
    headers = limited(services, MEGABYTE)
    answer = client.post(
        "/v1/files",
        files={"file": ("p.jsonl", b"x" * 2 * MEGABYTE)},
        data={"purpose": "fine-tune"},
        headers=headers,
    )
    assert error_of(answer, 403)["code"] == "storage_limit_reached"
    assert stored_bytes(services) == 0 == used(services)


def test_a_file_that_fits_exactly_is_taken(client: TestClient, services: Services) -> None:
    headers = limited(services, MEGABYTE)
    for size, status in ((MEGABYTE - 10, 200), (11, 403), (10, 200), (1, 403)):
        files = {"file": ("p.jsonl", b"x" * size)}
        answer = client.post("/v1/files", files=files, data={"purpose": "fine-tune"}, headers=headers)
        assert answer.status_code == status, answer.text
    assert used(services) == MEGABYTE


def test_a_request_that_dies_reserves_nothing_for_ever(client: TestClient, services: Services) -> None:
    headers = limited(services, MEGABYTE)
    with services.database.write() as session:
        session.add(Reservation(id="dead", project="search", bytes=MEGABYTE, expires_at=database_now() + 1000))
    body = {"filename": "p.jsonl", "purpose": "fine-tune", "bytes": 5, "mime_type": "text/jsonl"}
    assert error_of(client.post("/v1/uploads", json=body, headers=headers), 403)["code"] == "storage_limit_reached"
    with services.database.write() as session:
        session.execute(update(Reservation).values(expires_at=database_now() - 1))
    assert client.post("/v1/uploads", json=body, headers=headers).status_code == 200
    expire(services)
    with services.database.read() as session:
        assert session.scalars(select(Reservation)).all() == []


def test_parallel_parts_of_an_upload_are_bounded(
    services: Services, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that are on their way count, so a hundred of them at once store no more than a few."""
    monkeypatch.setattr(uploads, "MAX_PART_BYTES", MEGABYTE)
    headers = limited(services, MEGABYTE)
    with served(settings) as (_, _, http), ThreadPoolExecutor(12) as threads:
        body = {"filename": "p.jsonl", "purpose": "fine-tune", "bytes": MEGABYTE // 2, "mime_type": "text/jsonl"}
        upload_id = http.post("/v1/uploads", json=body, headers=headers).raise_for_status().json()["id"]

        def send(_: int) -> int:
            files = {"data": ("part", b"x" * (MEGABYTE // 2))}
            return http.post(f"/v1/uploads/{upload_id}/parts", files=files, headers=headers).status_code

        statuses = Counter(threads.map(send, range(12)))
        assert statuses[200] == 2 and statuses[400] == 10
        assert stored_bytes(services) == MEGABYTE


def merge_of(client: TestClient, name: str, key: str) -> Response:
    return client.get(f"/v1/models/{name}/download", params={"format": "merged"}, headers=bearer(key))


def add_model(services: Services, name: str) -> None:
    """An adapter of the project `search`, with its folder."""
    services.storage.put_bytes(f"jobs/{name}/model/adapter_model.safetensors", b"weights")
    with services.database.write() as session:
        session.add(
            Model(
                name=name, kind="adapter", project="search", created_at=0.0, base_model="tiny",
                prefix=f"jobs/{name}/model", details={}, bytes=7,
            )
        )  # fmt: skip


def test_only_a_key_that_may_write_has_models_merged_and_only_a_few_at_a_time(
    client: TestClient, services: Services
) -> None:
    reads, writes = key_of(services, "search", Scope.READ), key_of(services, "search", Scope.WRITE)
    names = [f"ft-{number}" for number in range(6)]
    for name in names:
        add_model(services, name)
    assert error_of(merge_of(client, names[0], reads), 403)["code"] == "insufficient_scope"
    assert merge_of(client, names[0], writes).status_code == 202
    assert merge_of(client, names[0], reads).status_code == 202, "it is being made"
    assert [merge_of(client, name, writes).status_code for name in names[1:]] == [202, 202, 202, 429, 429]


def test_a_merge_needs_room_for_a_copy_of_the_base(client: TestClient, services: Services) -> None:
    key = key_of(services, "search")
    add_model(services, "ft-1")
    with services.database.write() as session:
        models.register(session, "tiny", "r1", {"architecture": "LlamaForCausalLM", "bytes": 5 * MEGABYTE})
    services.projects.limit("search", Limits(max_storage_bytes=5 * MEGABYTE))
    assert error_of(merge_of(client, "ft-1", key), 403)["code"] == "storage_limit_reached"
    services.projects.limit("search", Limits(max_storage_bytes=5 * MEGABYTE + 7))
    assert merge_of(client, "ft-1", key).status_code == 202


def test_merged_models_and_logs_count_until_they_are_removed(services: Services) -> None:
    with services.database.write() as session:
        counted_objects.note(session, "search", "merged/task-1/attempt-1", 100)
        counted_objects.note(session, "search", "jobs/ftjob-1/attempt-1/trainer.log", 20)
        counted_objects.note(session, "search", "jobs/ftjob-1/attempt-1/trainer.log", 25)
        session.add(Project(id="search", created_at=0.0))
    assert used(services) == 125
    prune(services, delete=True)  # the store is empty, and now belongs to this database
    services.storage.put_bytes("jobs/ftjob-1/attempt-1/trainer.log", b"x" * 25)
    prune(services, delete=True, min_age=0.0)
    assert used(services) == 100
