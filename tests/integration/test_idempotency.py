"""Requests that are sent again, as the official client does after a lost connection or a 5xx."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from sqlalchemy import update

from app.database import database_now
from app.idempotency.tables import SentRequest
from app.main import create_app
from app.services import Services
from app.settings import Settings
from tests.helpers.api import ROW, error_of, key_of, objects, rows, upload

RESENT = {"x-stainless-retry-count": "1"}


@pytest.fixture
def job(client: TestClient) -> dict[str, Any]:
    return {"model": "tiny", "training_file": upload(client), "metadata": {"b": "2", "a": "1"}}


class Flaky(httpx2.BaseTransport):
    """A network that loses the first answers: the service did the work, and the client does not hear of it."""

    def __init__(self, client: TestClient, losses: int) -> None:
        self.client, self.losses = client, losses
        self.counts: list[str | None] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.counts.append(request.headers.get("x-stainless-retry-count"))
        content = request.read()
        answer = self.client.request(request.method, str(request.url), content=content, headers=request.headers)
        if self.losses > 0:
            self.losses -= 1
            if self.losses % 2:
                raise httpx2.ReadError("the connection was lost", request=request)
            return httpx2.Response(500, json={"error": {"message": "a proxy's"}}, request=request)
        return httpx2.Response(answer.status_code, content=answer.content, headers=answer.headers, request=request)


@pytest.fixture
def flaky(client: TestClient, settings: Settings) -> Iterator[tuple[OpenAI, Flaky]]:
    network = Flaky(client, 2)
    with httpx2.Client(transport=network, base_url="http://localhost") as http:
        yield (
            OpenAI(base_url="http://localhost/v1", api_key=settings.admin_key, http_client=http, max_retries=2),
            network,
        )


def test_the_official_client_makes_one_job_and_one_file(
    flaky: tuple[OpenAI, Flaky], services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    client, network = flaky
    file = client.files.create(file=("p.jsonl", ROW), purpose="fine-tune")
    assert network.counts == ["0", "1", "2"]
    assert rows(services) == (1, 0)
    assert objects(services) == 1, "the bytes that came again are not kept"
    network.losses = 2
    made = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert rows(services) == (1, 1)
    network.losses = 2
    assert client.fine_tuning.jobs.cancel(made.id).status == "cancelled"
    network.losses, network.counts = 0, []
    with pytest.raises(Exception, match="cancelled already"):
        client.fine_tuning.jobs.cancel(made.id)
    assert network.counts == ["0"], "a conflict is not retried"


def test_an_idempotency_key_makes_one(client: TestClient, services: Services, job: dict[str, Any]) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = client.post("/v1/fine_tuning/jobs", json=job, headers=headers).json()
    turned = dict(reversed(job.items()))
    assert client.post("/v1/fine_tuning/jobs", json=turned, headers=headers).json()["id"] == first["id"]
    other = client.post("/v1/fine_tuning/jobs", json=job | {"suffix": "x"}, headers=headers)
    assert error_of(other, 400)["code"] == "idempotency_key_reused"
    assert client.post("/v1/fine_tuning/jobs", json=job, headers={"Idempotency-Key": "k2"}).json()["id"] != first["id"]
    assert rows(services) == (1, 2)


def test_what_was_not_sent_before_is_made(client: TestClient, services: Services, job: dict[str, Any]) -> None:
    """Two creates of the same job are two jobs; so are those of two keys, and one sent again after an hour."""
    made = [client.post("/v1/fine_tuning/jobs", json=job).json()["id"] for _ in range(2)]
    assert len(set(made)) == 2
    assert client.post("/v1/fine_tuning/jobs", json=job, headers=RESENT).json()["id"] == made[1]
    other = {"Authorization": f"Bearer {key_of(services, 'default')}"}
    assert client.post("/v1/fine_tuning/jobs", json=job, headers=RESENT | other).json()["id"] not in made
    assert client.post("/v1/fine_tuning/jobs", json=job | {"seed": 1}, headers=RESENT).json()["id"] not in made
    with services.database.write() as session:
        session.execute(update(SentRequest).values(created_at=database_now() - 3600))
    assert client.post("/v1/fine_tuning/jobs", json=job, headers=RESENT).json()["id"] not in made


@pytest.mark.parametrize("headers", [{"Idempotency-Key": "k"}, RESENT])
def test_sendings_that_overlap_make_one(
    settings: Settings, services: Services, client: TestClient, job: dict[str, Any], headers: dict[str, str]
) -> None:
    key = {"Authorization": f"Bearer {settings.admin_key}"}
    with TestClient(create_app(settings), base_url="http://localhost", headers=key) as second:  # another API process
        for through in (client, second):  # FastAPI builds routes at a first request; two applications must not at once
            assert through.get("/v1/fine_tuning/jobs").status_code == 200

        def send(number: int) -> str:
            through = (client, second)[number % 2]
            job_id: str = through.post("/v1/fine_tuning/jobs", json=job, headers=headers).json()["id"]
            return job_id

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(send, range(16)))) == 1
    assert rows(services) == (1, 1)


def test_parts_and_uploads_that_came_before(client: TestClient, services: Services) -> None:
    body = {"filename": "p.jsonl", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/jsonl"}
    begun = client.post("/v1/uploads", json=body).json()["id"]
    assert client.post("/v1/uploads", json=body, headers=RESENT).json()["id"] == begun
    part = client.post(f"/v1/uploads/{begun}/parts", files={"data": b"abc"}).json()["id"]
    again = client.post(f"/v1/uploads/{begun}/parts", files={"data": b"abc"}, headers=RESENT).json()["id"]
    assert again != part, "two parts may hold the same bytes"
    keyed = [
        client.post(f"/v1/uploads/{begun}/parts", files={"data": b""}, headers={"Idempotency-Key": "p"}).status_code
    ]
    assert keyed == [400]
    done = client.post(f"/v1/uploads/{begun}/complete", json={"part_ids": [again]})
    assert done.json()["status"] == "completed"
    assert services.storage.list("uploads") == []
