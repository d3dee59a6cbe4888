"""Uploads in parts: order, sizes, checksums and ends."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from app.database import database_now
from app.projects.schemas import Limits
from app.services import Services
from app.uploads.tables import Upload
from tests.helpers.api import error_of, objects
from worker.housekeeping import expire


def begin(client: TestClient, size: int) -> str:
    body = {"filename": "p.jsonl", "purpose": "fine-tune", "bytes": size, "mime_type": "text/jsonl"}
    answer = client.post("/v1/uploads", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "pending"
    assert answer.json()["expires_at"] - answer.json()["created_at"] == 3600
    upload_id: str = answer.json()["id"]
    return upload_id


def add(client: TestClient, upload_id: str, content: bytes) -> str:
    answer = client.post(f"/v1/uploads/{upload_id}/parts", files={"data": content})
    assert answer.status_code == 200, answer.text
    part_id: str = answer.json()["id"]
    return part_id


def test_parallel_parts_are_joined_in_the_requested_order(client: TestClient, services: Services) -> None:
    pieces = [bytes([65 + number]) * 300_000 for number in range(8)]
    whole = b"".join(pieces)
    upload_id = begin(client, len(whole))
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda piece: add(client, upload_id, piece), pieces))
    body = {"part_ids": parts, "md5": hashlib.md5(whole).hexdigest()}
    completed = client.post(f"/v1/uploads/{upload_id}/complete", json=body).json()
    assert completed["status"] == "completed"
    assert client.get(f"/v1/files/{completed['file']['id']}/content").content == whole
    with services.database.read() as session:
        from app.files.tables import File

        assert session.get_one(File, completed["file"]["id"]).sha256 == hashlib.sha256(whole).hexdigest()
    assert client.post(f"/v1/uploads/{upload_id}/complete", json=body).json() == completed, "sent again"
    assert services.storage.list("uploads") == []
    assert objects(services) == 1
    assert error_of(client.post(f"/v1/uploads/{upload_id}/cancel"), 409)["code"] == "upload_ended"


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"md5": "0" * 32}, "checksum_mismatch", "md5"),
        ({"md5": "no"}, "invalid_value", "md5"),
        ({"part_ids": ["part-none"]}, "part_not_found", "part_ids"),
        ({"part_ids": []}, "invalid_value", "part_ids"),
    ],
)
def test_a_completion_that_does_not_match_is_refused_and_the_upload_stays(
    client: TestClient, services: Services, change: dict[str, object], code: str, param: str
) -> None:
    upload_id = begin(client, 6)
    parts = [add(client, upload_id, b"abc"), add(client, upload_id, b"def")]
    body = {"part_ids": parts} | change
    error = error_of(client.post(f"/v1/uploads/{upload_id}/complete", json=body), 400)
    assert (error["code"], error["param"]) == (code, param)
    twice = error_of(client.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [parts[0]] * 2}), 400)
    assert twice["param"] == "part_ids"
    short = error_of(client.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": parts[:1]}), 400)
    assert short["code"] == "upload_size_mismatch"
    assert objects(services) == 0
    assert client.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": parts}).json()["status"] == "completed"


def test_an_empty_or_oversized_part_is_refused(client: TestClient, services: Services) -> None:
    upload_id = begin(client, 4)
    add(client, upload_id, b"abc")
    for content, code in ((b"defgh", "upload_too_large"), (b"", "empty_part")):
        answer = client.post(f"/v1/uploads/{upload_id}/parts", files={"data": content})
        assert error_of(answer, 400)["code"] == code
    assert len(services.storage.list("uploads")) == 1, "a refused part leaves nothing"
    huge = {"data": b"x" * (64 * 1024**2 + 1)}
    assert error_of(client.post(f"/v1/uploads/{upload_id}/parts", files=huge), 413)["param"] == "data"
    too_large = {"filename": "f", "purpose": "fine-tune", "bytes": 8 * 1024**3 + 1, "mime_type": "text/jsonl"}
    assert error_of(client.post("/v1/uploads", json=too_large), 400)["param"] == "bytes"


def test_cancelled_and_expired_uploads_accept_nothing_and_leave_nothing(client: TestClient, services: Services) -> None:
    cancelled, expired = begin(client, 3), begin(client, 3)
    for upload_id in (cancelled, expired):
        add(client, upload_id, b"abc")
    assert client.post(f"/v1/uploads/{cancelled}/cancel").json()["status"] == "cancelled"
    assert client.post(f"/v1/uploads/{cancelled}/cancel").json()["status"] == "cancelled", "sent again"
    with services.database.write() as session:
        session.execute(update(Upload).where(Upload.id == expired).values(expires_at=database_now() - 1))
    for upload_id, status in ((cancelled, "cancelled"), (expired, "expired")):
        error = error_of(client.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"abc"}), 409)
        assert status in error["message"]
        error_of(client.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": ["part-x"]}), 409)
    expire(services)
    assert services.storage.list("uploads") == []
    error_of(client.post("/v1/uploads/upload-none/cancel"), 404)
    error_of(client.post("/v1/uploads/upload-none/parts", files={"data": b"abc"}), 404)


def test_a_file_is_gone_after_its_expiry_time(client: TestClient, services: Services) -> None:
    from app.files.tables import File

    form = {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    file = client.post("/v1/files", files={"file": ("p.jsonl", b"x")}, data=form).json()
    assert file["expires_at"] == file["created_at"] + 3600
    with services.database.write() as session:
        session.execute(update(File).values(expires_at=database_now() - 1))
    error_of(client.get(f"/v1/files/{file['id']}"), 404)
    assert client.get("/v1/files").json()["data"] == []
    from worker.housekeeping import keep_house

    keep_house(services)
    assert objects(services) == 0


def test_a_project_stores_no_more_than_its_limit(client: TestClient, services: Services) -> None:
    services.projects.limit("default", Limits(max_storage_bytes=10))
    form = {"purpose": "fine-tune"}
    assert client.post("/v1/files", files={"file": ("p", b"x" * 8)}, data=form).status_code == 200
    refused = client.post("/v1/files", files={"file": ("p", b"x" * 3)}, data=form)
    assert error_of(refused, 403)["code"] == "storage_limit_reached"
    body = {"filename": "p", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/jsonl"}
    assert error_of(client.post("/v1/uploads", json=body), 403)["code"] == "storage_limit_reached"
    assert client.post("/v1/uploads", json=body | {"bytes": 2}).status_code == 200
    assert error_of(client.post("/v1/uploads", json=body | {"bytes": 1}), 403), "a pending upload counts"
    assert objects(services) == 1
