"""Requests that are sent again, as the official client does after a lost connection or a 5xx."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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
def job(client: TestClient) -> dict[str, object]:
    return {"model": "tiny", "training_file": upload(client), "metadata": {"b": "2", "a": "1"}}


class Flaky(httpx2.BaseTransport):
    """A network that loses the first answers. The service did the work, and the client does not know."""

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


def test_the_official_client_creates_one_job_and_one_file_despite_lost_answers(
    flaky: tuple[OpenAI, Flaky], services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    client, network = flaky
    file = client.files.create(file=("p.jsonl", ROW), purpose="fine-tune")
    assert network.counts == ["0", "1", "2"]
    assert rows(services) == (1, 0)
    assert objects(services) == 1, "the bytes of the retries are not kept"
    network.losses = 2
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert rows(services) == (1, 1)
    network.losses = 2
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    network.losses, network.counts = 0, []
    with pytest.raises(Exception, match="cancelled already"):
        client.fine_tuning.jobs.cancel(job.id)
    assert network.counts == ["0"], "a conflict is not retried"


def test_an_idempotency_key_creates_one_job(client: TestClient, services: Services, job: dict[str, object]) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = client.post("/v1/fine_tuning/jobs", json=job, headers=headers).json()
    reordered = dict(reversed(job.items()))
    assert client.post("/v1/fine_tuning/jobs", json=reordered, headers=headers).json()["id"] == first["id"]
    changed = client.post("/v1/fine_tuning/jobs", json=job | {"suffix": "x"}, headers=headers)
    assert error_of(changed, 400)["code"] == "idempotency_key_reused"
    assert client.post("/v1/fine_tuning/jobs", json=job, headers={"Idempotency-Key": "k2"}).json()["id"] != first["id"]
    assert rows(services) == (1, 2)


def test_a_request_that_was_not_sent_before_creates_a_job(
    client: TestClient, services: Services, job: dict[str, object]
) -> None:
    """The same body creates another job without a retry count, with another key, or after an hour."""
    ids = [client.post("/v1/fine_tuning/jobs", json=job).json()["id"] for _ in range(2)]
    assert len(set(ids)) == 2
    assert client.post("/v1/fine_tuning/jobs", json=job, headers=RESENT).json()["id"] == ids[1]
    other_key = {"Authorization": f"Bearer {key_of(services, 'default')}"}
    assert client.post("/v1/fine_tuning/jobs", json=job, headers=RESENT | other_key).json()["id"] not in ids
    assert client.post("/v1/fine_tuning/jobs", json=job | {"seed": 1}, headers=RESENT).json()["id"] not in ids
    with services.database.write() as session:
        session.execute(update(SentRequest).values(created_at=database_now() - 3600))
    assert client.post("/v1/fine_tuning/jobs", json=job, headers=RESENT).json()["id"] not in ids


@pytest.mark.parametrize("headers", [{"Idempotency-Key": "k"}, RESENT])
def test_concurrent_sendings_of_a_request_create_one_job(
    settings: Settings, services: Services, client: TestClient, job: dict[str, object], headers: dict[str, str]
) -> None:
    key = {"Authorization": f"Bearer {settings.admin_key}"}
    with TestClient(create_app(settings), base_url="http://localhost", headers=key) as second:  # another API process
        for api in (client, second):  # FastAPI builds routes at the first request: one API after the other
            assert api.get("/v1/fine_tuning/jobs").status_code == 200

        def send(number: int) -> str:
            api = (client, second)[number % 2]
            job_id: str = api.post("/v1/fine_tuning/jobs", json=job, headers=headers).json()["id"]
            return job_id

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(send, range(16)))) == 1
    assert rows(services) == (1, 1)


def test_a_resent_upload_is_created_once_and_a_resent_part_is_a_new_part(
    client: TestClient, services: Services
) -> None:
    body = {"filename": "p.jsonl", "purpose": "fine-tune", "bytes": 3, "mime_type": "text/jsonl"}
    upload_id = client.post("/v1/uploads", json=body).json()["id"]
    assert client.post("/v1/uploads", json=body, headers=RESENT).json()["id"] == upload_id
    part_id = client.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"abc"}).json()["id"]
    resent_part_id = client.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"abc"}, headers=RESENT).json()["id"]
    assert resent_part_id != part_id, "two parts may hold the same bytes"
    statuses = [
        client.post(f"/v1/uploads/{upload_id}/parts", files={"data": b""}, headers={"Idempotency-Key": "p"}).status_code
    ]
    assert statuses == [400]
    answer = client.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [resent_part_id]})
    assert answer.json()["status"] == "completed"
    assert services.storage.list("uploads") == []
