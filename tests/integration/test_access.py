"""Access to every route of the OpenAPI document.

A caller without access is refused before a byte of the body is read. A caller with access sees nothing of other
projects. A new route is tested automatically. A new kind of object needs an entry in `UNKNOWN_IDS`.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select, update
from starlette.types import Message

from app.database import Table, database_now
from app.jobs.tables import Checkpoint, Job
from app.keys.schemas import KeySpec, Scope
from app.keys.service import generate
from app.keys.tables import ApiKey
from app.models.tables import Model
from app.prune import NEEDED
from app.services import Services
from app.sweeps.tables import Sweep
from app.webhooks import repository as webhooks
from app.webhooks.tables import WebhookDelivery, WebhookEndpoint
from tests.helpers.api import ROW, error_of, key_of, upload
from tests.helpers.derived_artifacts import work

OPEN = {"/healthz", "/readyz"}
INSTALLATION_ROUTES = ("/v1/keys", "/v1/projects", "/v1/workers", "/v1/operations", "/v1/audit")
"""Routes of the whole installation, for the scope admin."""
UNKNOWN_IDS = {
    "file_id": "file-none",
    "upload_id": "upload-none",
    "job_id": "ftjob-none",
    "evaluation_id": "eval-none",
    "labelling_id": "labelling-none",
    "pipeline_id": "pipeline-none",
    "sweep_id": "sweep-none",
    "name": "ft:tiny:none::none",
    "endpoint_id": "whe-none",
    "delivery_id": "whd-none",
    "project_id": "none",
    "key_id": "key-none",
}
"""Every path parameter with an id that does not exist."""
BODIES: dict[str, dict[str, Any]] = {
    "/v1/uploads/{upload_id}/complete": {"json": {"part_ids": ["part-x"]}},
    "/v1/uploads/{upload_id}/parts": {"files": {"data": b"x"}},
    "/v1/labellings/{labelling_id}/verdicts": {"json": {"item": 0, "skip": True}},
    "/v1/webhooks/{endpoint_id}": {"json": {"enabled": False}},
    "/v1/workers/{name}": {"json": {"cordoned": True}},
    "/v1/projects/{project_id}": {"json": {"max_running_jobs": 1}},
}
MODEL = "ft:tiny:default::mine"
CHECKPOINT = f"{MODEL}:ckpt-step-1"


@pytest.fixture
def known_ids(client: TestClient, services: Services) -> dict[str, str]:
    """Path parameters with the ids of one object of every kind, in the project `default`."""
    file_id = upload(client)
    body = {"filename": "p.jsonl", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/jsonl"}
    job_id = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file_id}).json()["id"]
    evaluation = {"type": "preference", "data": file_id, "candidate": {"model": "tiny"}, "baseline": {"model": "tiny"}}
    evaluation_id = client.post("/v1/evaluations", json=evaluation).json()["id"]
    writers = {"writers": [{"model": "tiny"}, {"model": "tiny"}]}
    labelling = {"data": file_id, "labellers": [{"people": {}}], **writers}
    labelling_id = client.post("/v1/labellings", json=labelling).json()["id"]
    pipeline = {"stages": [{"name": "label", "labelling": labelling}]}
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
            sealed_secret=services.secret_box.seal("whsec_x"), created_at=database_now(),
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
        "labelling_id": labelling_id,
        "pipeline_id": client.post("/v1/pipelines", json=pipeline).raise_for_status().json()["id"],
        "sweep_id": "sweep-1",
        "name": MODEL,
        "endpoint_id": "whe-1",
        "delivery_id": delivery_id,
        "project_id": "default",
        "key_id": key.id,
    }


def operations(client: TestClient) -> Iterator[tuple[str, str]]:
    """(method, path with its parameters) of every route that needs a key."""
    app: Any = client.app
    for path, methods in app.openapi()["paths"].items():
        if path not in OPEN:
            for method in methods:
                yield method.upper(), path


def test_no_route_reads_the_body_of_an_unauthorised_request(
    client: TestClient, services: Services, known_ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.keys.rates.SLOW_SECONDS", 0.0)
    expired, revoked, valid = (key_of(services, "default") for _ in range(3))
    digests = {name: services.secret_box.signature(key) for name, key in (("expired", expired), ("revoked", revoked))}
    with services.database.write() as session:
        expire = update(ApiKey).values(expires_at=database_now() - 1)
        session.execute(expire.where(ApiKey.digest == digests["expired"]))
        session.execute(update(ApiKey).values(revoked_at=database_now()).where(ApiKey.digest == digests["revoked"]))
    token, _ = services.keys.stream_token("admin", "/v1/fine_tuning/jobs/another/stream")
    before = made(services)
    credentials = {
        "no key": [],
        "an empty key": [("authorization", "Bearer ")],
        "another scheme": [("authorization", f"Basic {valid}")],
        "an unknown key": [("authorization", f"Bearer {generate()}")],
        "a mistyped key": [("authorization", f"Bearer {valid[:-1]}{'0' if valid[-1] != '0' else '1'}")],
        "an expired key": [("authorization", f"Bearer {expired}")],
        "a revoked key": [("authorization", f"Bearer {revoked}")],
    }
    length = ("content-length", str(10**12))
    for method, path in operations(client):
        for credential, headers in credentials.items():
            status = asyncio.run(ask(client, method, path.format(**known_ids), [*headers, length]))
            assert status == 401, (credential, method, path)
        query = f"token={token}".encode()
        assert asyncio.run(ask(client, method, path.format(**known_ids), [length], query)) == 401, (method, path)
    assert asyncio.run(ask(client, "POST", "/v1/files", [("host", "evil.example")], host=False)) == 400
    assert made(services) == before


def made(services: Services) -> dict[str, int]:
    """The number of rows of each table, and of objects."""
    with services.database.read() as session:
        rows = {
            name: session.scalars(select(func.count()).select_from(table)).one()
            for name, table in Table.metadata.tables.items()
        }
    return rows | {"objects": sum(len(services.storage.list(prefix)) for prefix in NEEDED)}


NO_ANSWER = ("/stream", "/report", "{evaluation_id}/download", "{labelling_id}/download")
"""The ends of the paths of routes without a finished answer here."""
READ_POSTS = {
    "/v1/fine_tuning/alpha/graders/run",
    "/v1/fine_tuning/alpha/graders/validate",
    "/v1/fine_tuning/estimate",
    "/v1/fine_tuning/jobs/{job_id}/stream_token",
    "/v1/evaluations/{evaluation_id}/stream_token",
    "/v1/labellings/estimate",
    "/v1/labellings/{labelling_id}/stream_token",
}
"""Routes that change nothing, though their method is POST."""


def test_a_key_that_may_only_read_makes_and_changes_nothing(
    client: TestClient, services: Services, known_ids: dict[str, str]
) -> None:
    """It reads whatever its project has, apart from the routes of the installation.

    Reports may be requested, and refused attempts go to the audit log.
    """
    reader = {"Authorization": f"Bearer {key_of(services, 'default', Scope.READ)}"}
    before, view_before = made(services), owner_view(client, known_ids)
    for method, path in operations(client):
        options = BODIES.get(path, {"json": {}} if method == "POST" else {})
        if path.endswith("/stream"):
            continue  # it ends with its job
        answer = client.request(method, path.format(**known_ids), headers=reader, **options)
        if path.startswith(INSTALLATION_ROUTES) or (method != "GET" and path not in READ_POSTS):
            assert error_of(answer, 403)["code"] == "insufficient_scope", (method, path)
        else:
            assert answer.status_code not in (401, 403), (method, path, answer.text)
    after = made(services)
    assert {name for name, count in after.items() if count != before[name]} <= {"tasks", "audit_events"}
    assert owner_view(client, known_ids) == view_before


async def ask(
    client: TestClient, method: str, path: str, headers: list[tuple[str, str]], query: bytes = b"", host: bool = True
) -> int:
    """The status of the answer. Raises if the route reads the body."""
    statuses: list[int] = []

    async def receive() -> Message:
        raise AssertionError(f"{method} {path} read the body")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    all_headers = [*headers, ("host", "localhost")] if host else headers
    scope = {
        "type": "http", "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode(),
        "query_string": query, "headers": [(name.encode(), value.encode()) for name, value in all_headers], "scheme": "http",
        "server": ("localhost", 80), "client": ("127.0.0.1", 1), "root_path": "",
    }  # fmt: skip
    await client.app(scope, receive, send)
    (status,) = statuses
    return status


def test_no_route_shows_or_changes_an_object_of_another_project(
    client: TestClient, services: Services, known_ids: dict[str, str]
) -> None:
    """A key of another project gets the same bytes for an existing id as for a missing one."""
    stranger = {"Authorization": f"Bearer {key_of(services, 'other', Scope.WRITE, Scope.LABEL)}"}
    view_before = owner_view(client, known_ids)
    for method, path in operations(client):
        options = BODIES.get(path, {"json": {}} if method == "POST" else {})
        if path.startswith(INSTALLATION_ROUTES):
            error_of(client.request(method, path.format(**known_ids), headers=stranger, **options), 403)
        elif "{" in path:
            existing = client.request(method, path.format(**known_ids), headers=stranger, **options)
            missing = client.request(method, path.format(**UNKNOWN_IDS), headers=stranger, **options)
            error_of(existing, 404)
            text = existing.text
            for name, value in known_ids.items():
                text = text.replace(value, UNKNOWN_IDS[name])
            assert text == missing.text, (method, path)
        elif method == "GET" and path.startswith("/v1"):
            items = client.get(path, headers=stranger).json()["data"]
            assert [item["id"] for item in items] == (["tiny"] if path == "/v1/models" else []), path
    assert owner_view(client, known_ids) == view_before
    assert services.storage.list("files") and services.storage.list("jobs/x")


def owner_view(client: TestClient, known_ids: dict[str, str]) -> list[bytes]:
    """Every answer that the owner can read, except those that change with time."""
    answers = []
    for method, path in operations(client):
        project_route = path.startswith("/v1") and not path.startswith(INSTALLATION_ROUTES)
        if method == "GET" and project_route and not path.endswith(NO_ANSWER):
            answer = client.get(path.format(**known_ids))
            assert answer.status_code == 200, (path, answer.text)
            answers.append(answer.content)
    return answers


def test_a_body_cannot_name_an_object_of_another_project(
    client: TestClient, services: Services, known_ids: dict[str, str]
) -> None:
    stranger = {"Authorization": f"Bearer {key_of(services, 'other', Scope.WRITE)}"}
    own_file = client.post(
        "/v1/files", files={"file": ("p.jsonl", ROW)}, data={"purpose": "fine-tune"}, headers=stranger
    ).json()["id"]
    evaluations = {"evaluations": [{"name": "e", "type": "preference", "data": known_ids["file_id"]}]}
    job = {"model": "tiny", "training_file": own_file, **evaluations}
    error = error_of(client.post("/v1/fine_tuning/jobs", json=job, headers=stranger), 400)
    assert (error["param"], error["code"]) == ("evaluations.0.data", "file_not_found")
    method = {"type": "dpo", "dpo": {"hyperparameters": {"reference_model": MODEL}}}
    learned = {"type": "reward_model", "name": "learned", "model": MODEL}
    grader = {"type": "multi", "name": "m", "graders": {"learned": learned}, "calculate_output": "learned"}
    graded = {"type": "reinforcement", "reinforcement": {"grader": grader}}
    for changes, param in (
        ({"training_file": known_ids["file_id"]}, "training_file"),
        ({"validation_file": known_ids["file_id"]}, "validation_file"),
        ({"sft": {"training_file": known_ids["file_id"]}}, "sft.training_file"),
        ({"model": MODEL}, "model"),
        ({"model": CHECKPOINT}, "model"),
        ({"method": method}, "method.dpo.hyperparameters.reference_model"),
        ({"method": graded}, "method.reinforcement.grader.graders.learned.model"),
    ):
        body = {"model": "tiny", "training_file": own_file, "method": {"type": "dpo"}} | changes
        error = error_of(client.post("/v1/fine_tuning/jobs", json=body, headers=stranger), 400)
        assert error["param"] == param
        assert error["code"] in ("file_not_found", "model_not_found")
        estimate = client.post("/v1/fine_tuning/estimate", json=body, headers=stranger).json()
        assert [refused["param"] for refused in estimate["refused"]] == [param]
    for parameter, name in (("after", "file_id"), ("after", "job_id")):
        listing = "/v1/files" if name == "file_id" else "/v1/fine_tuning/jobs"
        error_of(client.get(listing, params={parameter: known_ids[name]}, headers=stranger), 404)
    work(services)
    report = client.get(f"/v1/files/{own_file}/report", params={"model": MODEL}, headers=stranger)
    assert error_of(report, 400)["param"] == "model"
