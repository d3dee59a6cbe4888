"""Every route of the OpenAPI document: who may not ask is refused before a byte of the body is read, and who may ask
sees nothing of other projects. A new route is in here by itself; a new kind of object has to be added to `THINGS`."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from app.database import database_now
from app.jobs.tables import Checkpoint, Job
from app.keys.schemas import KeySpec, Scope
from app.keys.service import generate
from app.keys.tables import ApiKey
from app.models.tables import Model
from app.services import Services
from app.sweeps.tables import Sweep
from app.webhooks import repository as webhooks
from app.webhooks.tables import WebhookDelivery, WebhookEndpoint
from tests.helpers.api import ROW, error_of, key_of, upload
from tests.helpers.derived_artifacts import work

OPEN = {"/healthz", "/readyz"}
OF_ALL = ("/v1/keys", "/v1/projects")
"""The installation's own, for the scope admin."""
THINGS = {
    "file_id": "file-none",
    "upload_id": "upload-none",
    "job_id": "ftjob-none",
    "evaluation_id": "eval-none",
    "sweep_id": "sweep-none",
    "name": "ft:tiny:none::none",
    "endpoint_id": "whe-none",
    "delivery_id": "whd-none",
    "project_id": "none",
    "key_id": "key-none",
}
"""The parameters of paths, each with an id that nothing has."""
BODIES: dict[str, dict[str, Any]] = {
    "/v1/uploads/{upload_id}/complete": {"json": {"part_ids": ["part-x"]}},
    "/v1/uploads/{upload_id}/parts": {"files": {"data": b"x"}},
    "/v1/webhooks/{endpoint_id}": {"json": {"enabled": False}},
    "/v1/projects/{project_id}": {"json": {"max_running_jobs": 1}},
}
MODEL = "ft:tiny:default::mine"
CHECKPOINT = f"{MODEL}:ckpt-step-1"


@pytest.fixture
def things(client: TestClient, services: Services) -> dict[str, str]:
    """One of everything, of the project `default`."""
    file_id = upload(client)
    body = {"filename": "p.jsonl", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/jsonl"}
    job_id = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id}).json()["id"]
    evaluation = {"type": "preference", "data": file_id, "candidate": {"model": "tiny"}, "baseline": {"model": "tiny"}}
    evaluation_id = client.post("/v1/evaluations", json=evaluation).json()["id"]
    services.storage.put_bytes("jobs/x/model/adapter_config.json", b"{}")
    services.storage.put_bytes(f"jobs/{job_id}/attempt-1/trainer.log", b"a log")
    with services.database.write() as session:
        session.add(
            Model(
                name=MODEL, kind="adapter", project="default", created_at=database_now(), base_model="tiny", bytes=2,
                job_id=job_id, prefix="jobs/x/model", details={"adapter": None, "foundation": None},
            )
        )  # fmt: skip
        session.add(
            Checkpoint(
                id="ftckpt-1", job_id=job_id, created_at=database_now(), stage="dpo", step_number=1,
                model_name=CHECKPOINT, metrics={}, prefix="jobs/x",
            )
        )  # fmt: skip
        endpoint = WebhookEndpoint(
            id="whe-1", project="default", url="https://example.com/", events=["fine_tuning.job.succeeded"],
            sealed_secret=services.vault.seal("whsec_x"), created_at=database_now(),
        )  # fmt: skip
        session.add(endpoint)
        job = session.get_one(Job, job_id)
        job.sweep_id, job.metrics = "sweep-1", {"loss": 0.5, "eval/loss": 0.4}
        axes = {"x": "loss", "y": "eval/loss"}
        settings = {"jobs": {job_id: {"beta": 0.1}}, "frontier": axes}
        session.add(Sweep(id="sweep-1", project="default", grid={"beta": [0.1]}, settings=settings))
        session.flush()
        webhooks.enqueue(session, "default", "fine_tuning.job.succeeded", {"id": job_id})
    with services.database.read() as session:
        delivery_id = session.scalars(select(WebhookDelivery.id)).one()
    key = services.keys.create(KeySpec(name="mine", project="default"))
    return {
        "file_id": file_id,
        "upload_id": client.post("/v1/uploads", json=body).json()["id"],
        "job_id": job_id,
        "evaluation_id": evaluation_id,
        "sweep_id": "sweep-1",
        "name": MODEL,
        "endpoint_id": "whe-1",
        "delivery_id": delivery_id,
        "project_id": "default",
        "key_id": key.id,
    }


def operations(client: TestClient) -> Iterator[tuple[str, str]]:
    """(method, path with its parameters) of every route that wants a key."""
    app: Any = client.app
    for path, methods in app.openapi()["paths"].items():
        if path not in OPEN:
            for method in methods:
                yield method.upper(), path


def test_no_route_reads_a_byte_of_who_may_not_ask(
    client: TestClient, services: Services, things: dict[str, str]
) -> None:
    expired, revoked, other = (key_of(services, "default") for _ in range(3))
    digests = {name: services.keys._digest(key) for name, key in (("expired", expired), ("revoked", revoked))}
    with services.database.write() as session:
        ended = update(ApiKey).values(expires_at=database_now() - 1)
        session.execute(ended.where(ApiKey.digest == digests["expired"]))
        session.execute(update(ApiKey).values(revoked_at=database_now()).where(ApiKey.digest == digests["revoked"]))
    token, _ = services.keys.stream_token("default", "/v1/fine_tuning/jobs/another/stream")
    credentials = {
        "no key": [],
        "an empty key": [("authorization", "Bearer ")],
        "another scheme": [("authorization", f"Basic {other}")],
        "an unknown key": [("authorization", f"Bearer {generate()}")],
        "a mistyped key": [("authorization", f"Bearer {other[:-1]}{'0' if other[-1] != '0' else '1'}")],
        "an expired key": [("authorization", f"Bearer {expired}")],
        "a revoked key": [("authorization", f"Bearer {revoked}")],
    }
    length = ("content-length", str(10**12))
    for method, path in operations(client):
        for what, headers in credentials.items():
            status = asyncio.run(ask(client, method, path.format(**things), [*headers, length]))
            assert status == 401, (what, method, path)
        query = f"token={token}".encode()
        assert asyncio.run(ask(client, method, path.format(**things), [length], query)) == 401, (method, path)
    assert asyncio.run(ask(client, "POST", "/v1/files", [("host", "evil.example")], host=False)) == 400


async def ask(
    client: TestClient, method: str, path: str, headers: list[tuple[str, str]], query: bytes = b"", host: bool = True
) -> int:
    """The status of an answer that is given without a look at the body."""
    statuses: list[int] = []

    async def receive() -> Any:
        raise AssertionError(f"{method} {path} read the body")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    named = [*headers, ("host", "localhost")] if host else headers
    scope = {
        "type": "http", "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode(),
        "query_string": query, "headers": [(k.encode(), v.encode()) for k, v in named], "scheme": "http",
        "server": ("localhost", 80), "client": ("127.0.0.1", 1), "root_path": "",
    }  # fmt: skip
    await client.app(scope, receive, send)
    (status,) = statuses
    return status


def test_no_route_shows_or_touches_what_is_anothers(
    client: TestClient, services: Services, things: dict[str, str]
) -> None:
    """For the key of another project what is there and what is not are the same, to the byte."""
    stranger = {"Authorization": f"Bearer {key_of(services, 'other', Scope.WRITE)}"}
    before = seen(client, things)
    for method, path in operations(client):
        options = BODIES.get(path, {"json": {}} if method == "POST" else {})
        if path.startswith(OF_ALL):
            error_of(client.request(method, path.format(**things), headers=stranger, **options), 403)
        elif "{" in path:
            there = client.request(method, path.format(**things), headers=stranger, **options)
            absent = client.request(method, path.format(**THINGS), headers=stranger, **options)
            error_of(there, 404)
            text = there.text
            for name, value in things.items():
                text = text.replace(value, THINGS[name])
            assert text == absent.text, (method, path)
        elif method == "GET" and path.startswith("/v1"):
            found = client.get(path, headers=stranger).json()["data"]
            assert [one["id"] for one in found] == (["tiny"] if path == "/v1/models" else []), path
    assert seen(client, things) == before
    assert services.storage.list("files") and services.storage.list("jobs/x")


def seen(client: TestClient, things: dict[str, str]) -> list[Any]:
    """All that its owner can read, but for what the clock moves."""
    answers = []
    for method, path in operations(client):
        own = path.startswith("/v1") and not path.startswith(OF_ALL)
        if method == "GET" and own and not path.endswith(("/stream", "/report", "{evaluation_id}/download")):
            answer = client.get(path.format(**things))
            assert answer.status_code == 200, (path, answer.text)
            answers.append(answer.content)
    return answers


def test_what_is_anothers_cannot_be_named_in_a_body(
    client: TestClient, services: Services, things: dict[str, str]
) -> None:
    stranger = {"Authorization": f"Bearer {key_of(services, 'other', Scope.WRITE)}"}
    own = client.post(
        "/v1/files", files={"file": ("p.jsonl", ROW)}, data={"purpose": "fine-tune"}, headers=stranger
    ).json()["id"]
    evaluated = {"evaluations": [{"name": "e", "type": "preference", "data": things["file_id"]}]}
    job = {"model": "tiny", "training_file": own, **evaluated}
    error = error_of(client.post("/v1/fine_tuning/jobs", json=job, headers=stranger), 400)
    assert (error["param"], error["code"]) == ("evaluations.0.data", "file_not_found")
    held = {"type": "dpo", "dpo": {"hyperparameters": {"reference_model": MODEL}}}
    for changes, param in (
        ({"training_file": things["file_id"]}, "training_file"),
        ({"validation_file": things["file_id"]}, "validation_file"),
        ({"sft": {"training_file": things["file_id"]}}, "sft.training_file"),
        ({"model": MODEL}, "model"),
        ({"model": CHECKPOINT}, "model"),
        ({"method": held}, "method.dpo.hyperparameters.reference_model"),
    ):
        body = {"model": "tiny", "training_file": own, "method": {"type": "dpo"}} | changes
        error = error_of(client.post("/v1/fine_tuning/jobs", json=body, headers=stranger), 400)
        assert error["param"] == param
        assert error["code"] in ("file_not_found", "model_not_found")
        estimate = client.post("/v1/fine_tuning/estimate", json=body, headers=stranger).json()
        assert [refused["param"] for refused in estimate["refused"]] == [param]
    for place, name in (("after", "file_id"), ("after", "job_id")):
        listing = "/v1/files" if name == "file_id" else "/v1/fine_tuning/jobs"
        error_of(client.get(listing, params={place: things[name]}, headers=stranger), 404)
    work(services)
    report = client.get(f"/v1/files/{own}/report", params={"model": MODEL}, headers=stranger)
    assert error_of(report, 400)["param"] == "model"
