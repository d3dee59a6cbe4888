"""Webhooks, sent to a real HTTP server and unwrapped by the official client."""

import ipaddress
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, get_args

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
from worker.reaper import reap
from worker.webhooks import Sender


@dataclass
class Receiver:
    """A server that answers what it is told to, and keeps what it got."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
            status = found.statuses.pop(0) if found.statuses else 200
            self.send_response(status)
            if status == 302:
                self.send_header("Location", found.url + "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://localhost:{server.server_port}/hook?from=dpo"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"private_webhooks": ("localhost",)})


def sender(services: Services) -> Sender:
    return Sender(services, threading.Event(), "test")


def end_a_job(client: TestClient) -> str:
    job = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": upload(client)}).json()
    client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
    job_id: str = job["id"]
    return job_id


def later(services: Services) -> None:
    """Let the time until the next attempt pass."""
    with services.database.write() as session:
        waiting = update(WebhookDelivery).where(WebhookDelivery.eligible_at.is_not(None))
        session.execute(waiting.values(eligible_at=database_now()))


def test_the_official_client_unwraps_what_it_gets(client: TestClient, services: Services, receiver: Receiver) -> None:
    made = client.post("/v1/webhooks", json={"url": receiver.url}).json()
    job_id = end_a_job(client)
    assert sender(services).send_due() == 1
    ((headers, body),) = receiver.got
    assert headers["host"] == receiver.url.split("/")[2]
    official = OpenAI(api_key="x", webhook_secret=made["secret"])
    event = official.webhooks.unwrap(body, headers)
    assert event.type == "fine_tuning.job.cancelled"
    assert event.data.id == job_id
    assert event.id == headers["webhook-id"]
    with pytest.raises(InvalidWebhookSignatureError):
        official.webhooks.unwrap(body.replace(b"cancelled", b"succeeded"), headers)
    listed = client.get(f"/v1/webhooks/{made['id']}").json()
    assert "secret" not in listed and listed["enabled"]
    (delivery,) = client.get(f"/v1/webhooks/{made['id']}/deliveries").json()["data"]
    assert (delivery["status"], delivery["attempts"][0]["status"]) == ("delivered", 200)


def test_an_endpoint_gets_what_it_asked_for_and_others_nothing(
    client: TestClient, services: Services, receiver: Receiver
) -> None:
    client.post("/v1/webhooks", json={"url": receiver.url, "events": ["fine_tuning.job.succeeded"]})
    other = {"Authorization": f"Bearer {key_of(services, 'other')}"}
    theirs = client.post("/v1/webhooks", json={"url": receiver.url}, headers=other).json()
    end_a_job(client)
    assert sender(services).send_due() == 0
    error_of(client.get(f"/v1/webhooks/{theirs['id']}"), 404)
    error_of(client.delete(f"/v1/webhooks/{theirs['id']}"), 404)
    error_of(client.get(f"/v1/webhooks/{theirs['id']}/deliveries"), 404)


def test_what_fails_is_sent_again_by_the_schedule_and_then_given_up(
    client: TestClient, services: Services, receiver: Receiver
) -> None:
    made = client.post("/v1/webhooks", json={"url": receiver.url}).json()
    end_a_job(client)
    attempts = len(repository.SCHEDULE)
    receiver.statuses = [500, 302, 404] + [503] * (attempts - 3)
    for number in range(1, attempts + 1):
        assert sender(services).send_due() == 1
        (delivery,) = client.get(f"/v1/webhooks/{made['id']}/deliveries").json()["data"]
        assert len(delivery["attempts"]) == number
        if number < attempts:
            with services.database.read() as session:
                due = session.scalars(select(WebhookDelivery.eligible_at - database_now())).one()
            assert due == pytest.approx(repository.SCHEDULE[number], abs=5)
            assert sender(services).send_due() == 0
            later(services)
    assert delivery["status"] == "failed"
    assert "redirects" in delivery["attempts"][1]["error"]
    assert len(receiver.got) == attempts, "a redirect is not followed"
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    again = client.post(f"/v1/webhooks/{made['id']}/deliveries/{delivery['id']}/resend").json()
    assert again["status"] == "pending"
    assert sender(services).send_due() == 1
    assert client.get(f"/v1/webhooks/{made['id']}/deliveries").json()["data"][0]["status"] == "delivered"


def test_gone_switches_an_endpoint_off(client: TestClient, services: Services, receiver: Receiver) -> None:
    made = client.post("/v1/webhooks", json={"url": receiver.url}).json()
    for _ in range(2):
        end_a_job(client)
    receiver.statuses = [410]
    assert sender(services).send_due() == 1
    found = client.get("/v1/webhooks").json()["data"][0]
    assert not found["enabled"] and "410" in found["disabled_reason"]
    end_a_job(client)
    assert sender(services).send_due() == 0
    newest = client.get(f"/v1/webhooks/{made['id']}/deliveries").json()["data"][0]
    error_of(client.post(f"/v1/webhooks/{made['id']}/deliveries/{newest['id']}/resend"), 400)
    assert client.post(f"/v1/webhooks/{made['id']}", json={"enabled": True}).json()["enabled"]
    end_a_job(client)
    assert sender(services).send_due() == 1
    assert client.delete(f"/v1/webhooks/{made['id']}").json()["deleted"]
    end_a_job(client)
    assert sender(services).send_due() == 0


def test_a_lost_sender_costs_a_while(client: TestClient, services: Services, receiver: Receiver) -> None:
    client.post("/v1/webhooks", json={"url": receiver.url})
    end_a_job(client)
    with services.database.write() as session:
        assert repository.claim(session, "test") is not None, "and nothing comes of it"
        assert repository.claim(session, "test") is None
    reap(services.database)
    assert sender(services).send_due() == 0, "its lease is good"
    with services.database.write() as session:
        session.execute(update(WebhookDelivery).values(lease_expires_at=database_now() - 1))
    reap(services.database)
    assert sender(services).send_due() == 1


def test_a_delivery_that_is_being_sent_is_not_sent_twice_at_once(client: TestClient, services: Services) -> None:
    made = client.post("/v1/webhooks", json={"url": "https://1.1.1.1/hook", "events": list(get_args(EventType))}).json()
    end_a_job(client)
    with services.database.write() as session:
        claimed = repository.claim(session, "test")
        assert claimed is not None
    delivery = claimed[0].id
    client.post(f"/v1/webhooks/{made['id']}/deliveries/{delivery}/resend").raise_for_status()
    with services.database.write() as session:
        assert session.get_one(WebhookDelivery, delivery).attempt == 1
        assert repository.claim(session, "other") is None


def test_a_name_that_moves_inside_after_it_was_checked_gets_nothing(
    client: TestClient, services: Services, receiver: Receiver
) -> None:
    made = client.post("/v1/webhooks", json={"url": receiver.url}).json()
    end_a_job(client)
    with services.database.write() as session:
        session.execute(update(WebhookEndpoint).values(url=receiver.url.replace("localhost", "127.0.0.1")))
    sender(services).send_due()
    assert receiver.got == []
    (delivery,) = client.get(f"/v1/webhooks/{made['id']}/deliveries").json()["data"]
    assert "not sent" in delivery["attempts"][0]["error"]


@pytest.mark.parametrize("url", [
    "https://127.0.0.1/", "https://127.0.0.1.nip.invalid/", "https://10.0.0.1/x", "https://169.254.169.254/latest/meta-data",
    "https://[::1]/", "https://[::ffff:127.0.0.1]/", "https://[fd00::1]/", "https://0.0.0.0/", "https://2130706433/", "https://0x7f.1/",
    "http://93.184.216.34/", "ftp://93.184.216.34/", "https://user:pass@93.184.216.34/", "https:///x", "https://[", "nonsense",
    "https://93.184.216.34:99999/", "https://[fec0::1]/",
])  # fmt: skip
def test_urls_that_nothing_is_sent_to(client: TestClient, url: str) -> None:
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
def test_what_is_public(address: str, public: bool) -> None:
    assert outbound_http.is_public(ipaddress.ip_address(address)) is public


def test_secrets_are_kept_sealed(client: TestClient, services: Services, receiver: Receiver) -> None:
    secret = client.post("/v1/webhooks", json={"url": receiver.url}).json()["secret"]
    with services.database.read() as session:
        sealed = session.scalars(select(WebhookEndpoint.sealed_secret)).one()
    assert secret not in sealed
    assert services.vault.open(sealed) == secret
    with pytest.raises(ValueError, match="another DPO_SECRET_KEY"):
        SecretBox("another secret key").open(sealed)
