"""Webhooks, sent to a real HTTP server and unwrapped by the official client."""

import ipaddress
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from fastapi.testclient import TestClient
from openai import InvalidWebhookSignatureError, OpenAI
from sqlalchemy import select, update

from app import outbound_http
from app.database import database_now
from app.encryption import SecretBox
from app.services import Services
from app.settings import Settings
from app.webhooks import repository
from app.webhooks.schemas import EventType
from app.webhooks.tables import WebhookDelivery, WebhookEndpoint
from tests.helpers.api import error_of, key_of, upload
from tests.helpers.certificates import make_certificate
from tests.helpers.webhook_receiver import Receiver, webhook_receiver
from worker.reaper import reap
from worker.webhooks import Sender


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with webhook_receiver() as running_receiver:
        yield running_receiver


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"private_webhooks": ("localhost:*",)})


def sender(services: Services) -> Sender:
    return Sender(services, threading.Event(), "test")


def end_a_job(client: TestClient) -> str:
    job = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": upload(client)}).json()
    client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    job_id: str = job["id"]
    return job_id


def make_due(services: Services) -> None:
    """Make every waiting delivery due now."""
    with services.database.write() as session:
        waiting = update(WebhookDelivery).where(WebhookDelivery.eligible_at.is_not(None))
        session.execute(waiting.values(eligible_at=database_now()))


def test_the_official_client_unwraps_a_delivery(client: TestClient, services: Services, receiver: Receiver) -> None:
    endpoint = client.post("/v1/webhooks", json={"url": receiver.url}).json()
    job_id = end_a_job(client)
    assert sender(services).send_due() == 1
    ((headers, body),) = receiver.got
    assert headers["host"] == receiver.url.split("/")[2]
    official = OpenAI(api_key="x", webhook_secret=endpoint["secret"])
    event = official.webhooks.unwrap(body, headers)
    assert event.type == "fine_tuning.job.cancelled"
    assert event.data.id == job_id
    assert event.id == headers["webhook-id"]
    with pytest.raises(InvalidWebhookSignatureError):
        official.webhooks.unwrap(body.replace(b"cancelled", b"succeeded"), headers)
    shown_endpoint = client.get(f"/v1/webhooks/{endpoint['id']}").json()
    assert "secret" not in shown_endpoint and shown_endpoint["enabled"]
    (delivery,) = client.get(f"/v1/webhooks/{endpoint['id']}/deliveries").json()["data"]
    assert (delivery["status"], delivery["attempts"][0]["status"]) == ("delivered", 200)


def test_an_endpoint_gets_only_the_events_it_asked_for_of_its_project(
    client: TestClient, services: Services, receiver: Receiver
) -> None:
    client.post("/v1/webhooks", json={"url": receiver.url, "events": ["fine_tuning.job.succeeded"]})
    stranger = {"Authorization": f"Bearer {key_of(services, 'other')}"}
    other_endpoint = client.post("/v1/webhooks", json={"url": receiver.url}, headers=stranger).json()
    end_a_job(client)
    assert sender(services).send_due() == 0
    error_of(client.get(f"/v1/webhooks/{other_endpoint['id']}"), 404)
    error_of(client.delete(f"/v1/webhooks/{other_endpoint['id']}"), 404)
    error_of(client.get(f"/v1/webhooks/{other_endpoint['id']}/deliveries"), 404)


def test_a_failed_delivery_is_retried_by_the_schedule_and_then_given_up(
    client: TestClient, services: Services, receiver: Receiver
) -> None:
    endpoint = client.post("/v1/webhooks", json={"url": receiver.url}).json()
    end_a_job(client)
    attempts = len(repository.SCHEDULE)
    receiver.statuses = [500, 302, 404] + [503] * (attempts - 3)
    for number in range(1, attempts + 1):
        assert sender(services).send_due() == 1
        (delivery,) = client.get(f"/v1/webhooks/{endpoint['id']}/deliveries").json()["data"]
        assert len(delivery["attempts"]) == number
        if number < attempts:
            with services.database.read() as session:
                due = session.scalars(select(WebhookDelivery.eligible_at - database_now())).one()
            assert due == pytest.approx(repository.SCHEDULE[number], abs=5)
            assert sender(services).send_due() == 0
            make_due(services)
    assert delivery["status"] == "failed"
    assert "redirects" in delivery["attempts"][1]["error"]
    assert len(receiver.got) == attempts, "a redirect is not followed"
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    resent = client.post(f"/v1/webhooks/{endpoint['id']}/deliveries/{delivery['id']}/resend").json()
    assert resent["status"] == "pending"
    assert sender(services).send_due() == 1
    assert client.get(f"/v1/webhooks/{endpoint['id']}/deliveries").json()["data"][0]["status"] == "delivered"


def test_a_receiver_with_a_certificate_of_the_operators_authority_is_reached(
    client: TestClient, services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path)
    with webhook_receiver(certificate) as receiver:
        client.post("/v1/webhooks", json={"url": receiver.url})
        end_a_job(client)
        sender(services).send_due()
        assert not receiver.got, "no system knows the authority"
        make_due(services)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.authority))
        sender(services).send_due()
        assert len(receiver.got) == 1


def test_an_answer_410_disables_the_endpoint(client: TestClient, services: Services, receiver: Receiver) -> None:
    endpoint = client.post("/v1/webhooks", json={"url": receiver.url}).json()
    for _ in range(2):
        end_a_job(client)
    receiver.statuses = [410]
    assert sender(services).send_due() == 1
    disabled = client.get("/v1/webhooks").json()["data"][0]
    assert not disabled["enabled"] and "410" in disabled["disabled_reason"]
    end_a_job(client)
    assert sender(services).send_due() == 0
    newest = client.get(f"/v1/webhooks/{endpoint['id']}/deliveries").json()["data"][0]
    error_of(client.post(f"/v1/webhooks/{endpoint['id']}/deliveries/{newest['id']}/resend"), 400)
    assert client.post(f"/v1/webhooks/{endpoint['id']}", json={"enabled": True}).json()["enabled"]
    end_a_job(client)
    assert sender(services).send_due() == 1
    assert client.delete(f"/v1/webhooks/{endpoint['id']}").json()["deleted"]
    end_a_job(client)
    assert sender(services).send_due() == 0


def test_the_delivery_of_a_lost_sender_is_sent_once_its_lease_has_expired(
    client: TestClient, services: Services, receiver: Receiver
) -> None:
    client.post("/v1/webhooks", json={"url": receiver.url})
    end_a_job(client)
    with services.database.write() as session:
        assert repository.claim(session, "test") is not None, "and the sender dies here"
        assert repository.claim(session, "test") is None
    reap(services.database)
    assert sender(services).send_due() == 0, "the lease is still valid"
    with services.database.write() as session:
        session.execute(update(WebhookDelivery).values(lease_expires_at=database_now() - 1))
    reap(services.database)
    assert sender(services).send_due() == 1


def test_a_delivery_that_is_being_sent_is_not_sent_twice_at_once(client: TestClient, services: Services) -> None:
    endpoint = client.post(
        "/v1/webhooks", json={"url": "https://1.1.1.1/hook", "events": list(get_args(EventType))}
    ).json()
    end_a_job(client)
    with services.database.write() as session:
        claimed = repository.claim(session, "test")
        assert claimed is not None
    delivery = claimed[0].id
    client.post(f"/v1/webhooks/{endpoint['id']}/deliveries/{delivery}/resend").raise_for_status()
    with services.database.write() as session:
        assert session.get_one(WebhookDelivery, delivery).attempt == 1
        assert repository.claim(session, "other") is None


def test_a_host_that_becomes_private_after_its_check_gets_nothing(
    client: TestClient, services: Services, receiver: Receiver
) -> None:
    endpoint = client.post("/v1/webhooks", json={"url": receiver.url}).json()
    end_a_job(client)
    with services.database.write() as session:
        session.execute(update(WebhookEndpoint).values(url=receiver.url.replace("localhost", "127.0.0.1")))
    sender(services).send_due()
    assert receiver.got == []
    (delivery,) = client.get(f"/v1/webhooks/{endpoint['id']}/deliveries").json()["data"]
    assert "not sent" in delivery["attempts"][0]["error"]


@pytest.mark.parametrize("url", [
    "https://127.0.0.1/", "https://127.0.0.1.nip.invalid/", "https://10.0.0.1/x", "https://169.254.169.254/latest/meta-data",
    "https://[::1]/", "https://[::ffff:127.0.0.1]/", "https://[fd00::1]/", "https://0.0.0.0/", "https://2130706433/", "https://0x7f.1/",
    "http://93.184.216.34/", "ftp://93.184.216.34/", "https://user:pass@93.184.216.34/", "https:///x", "https://[", "nonsense",
    "https://93.184.216.34:99999/", "https://[fec0::1]/",
])  # fmt: skip
def test_an_unsafe_url_is_refused(client: TestClient, url: str) -> None:
    error = error_of(client.post("/v1/webhooks", json={"url": url}), 400)
    assert (error["code"], error["param"]) == ("invalid_url", "url")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("10.1.2.3", False), ("100.64.0.1", False), ("224.0.0.1", False),
        ("::ffff:10.0.0.1", False), ("2002:0a00:0001::1", False), ("64:ff9b::7f00:1", False), ("64:ff9b::5db8:d822", True),
        ("fe80::1", False), ("ff02::1", False), ("fec0::1", False), ("::7f00:1", False), ("64:ff9b:1::7f00:1", False), ("::ffff:0:7f00:1", False),
    ],
)  # fmt: skip
def test_only_global_addresses_are_public(address: str, public: bool) -> None:
    assert outbound_http.is_public(ipaddress.ip_address(address)) is public


def test_webhook_secrets_are_stored_sealed(client: TestClient, services: Services, receiver: Receiver) -> None:
    secret = client.post("/v1/webhooks", json={"url": receiver.url}).json()["secret"]
    with services.database.read() as session:
        sealed = session.scalars(select(WebhookEndpoint.sealed_secret)).one()
    assert secret not in sealed
    assert services.secret_box.open(sealed) == secret
    with pytest.raises(ValueError, match="another DPO_SECRET_KEY"):
        SecretBox(["another secret key"]).open(sealed)
