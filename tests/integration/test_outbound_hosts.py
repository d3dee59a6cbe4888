"""Host names of webhooks and judges: slow name servers, inner hosts, and receivers that never answer."""

import threading
from collections import Counter

import pytest
from fastapi.testclient import TestClient

from app import outbound_http
from app.projects.tables import Project
from app.services import Services
from app.webhooks import repository as webhooks
from app.webhooks.tables import WebhookEndpoint
from tests.helpers.api import error_of, key_of
from worker.webhooks import MAX_PER_PROJECT, _reaching


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_name_server_that_never_answers_is_not_waited_for(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr(outbound_http, "LOOKUP_SECONDS", 0.1)
    monkeypatch.setattr("app.outbound_http.socket.getaddrinfo", lambda *_, **__: never.wait(60))
    error = error_of(client.post("/v1/webhooks", json={"url": "https://host.example/"}), 400)
    never.set()
    assert error["code"] == "invalid_url"


def test_an_error_does_not_tell_whether_an_inner_host_exists(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def getaddrinfo(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host == "inside.internal":
            return [(0, 0, 0, "", ("10.0.0.7", 443))]
        raise OSError("no such host")

    monkeypatch.setattr("app.outbound_http.socket.getaddrinfo", getaddrinfo)
    messages = {
        error_of(client.post("/v1/webhooks", json={"url": f"https://{host}/"}), 400)["message"].replace(host, "HOST")
        for host in ("inside.internal", "missing.internal")
    }
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("name", "port", "allowed"),
    [
        ("inner", 443, True), ("inner", 80, True), ("inner", 8000, False), ("inner:8000", 8000, True),
        ("inner:8000", 443, False), ("inner:*", 8000, True), ("INNER:*", 1, True), ("other:*", 443, False), ("inn", 443, False),
    ],
)  # fmt: skip
def test_an_inner_host_is_allowed_with_its_port(name: str, port: int, allowed: bool) -> None:
    assert outbound_http.is_allowed("inner", port, (name,)) is allowed
    assert outbound_http.is_allowed("::1", port, (name.lower().replace("inner", "[::1]"),)) is allowed


def test_a_project_whose_receivers_never_answer_delays_no_other(services: Services) -> None:
    """Claims leave the deliveries of a project alone that has several on their way."""
    with services.database.write() as session:
        for project in ("slow", "quick"):
            session.add(Project(id=project, created_at=0.0))
            for number in range(10):
                endpoint = WebhookEndpoint(
                    id=f"whe-{project}-{number}", project=project, url="https://93.184.216.34/", events=["fine_tuning.job.succeeded"],
                    sealed_secret="", created_at=0.0,
                )  # fmt: skip
                session.add(endpoint)
                session.flush()
                webhooks.enqueue(session, project, "fine_tuning.job.succeeded", {"id": "ftjob-x"})
    taken = list[str]()
    for _ in range(2 * MAX_PER_PROJECT):
        with services.database.write() as session:
            claimed = webhooks.claim(session, "test", (), _reaching(MAX_PER_PROJECT, taken))
        assert claimed is not None
        taken.append(claimed[1].project)
    assert Counter(taken) == {"slow": MAX_PER_PROJECT, "quick": MAX_PER_PROJECT}


def test_a_project_has_a_bounded_number_of_endpoints(
    client: TestClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.webhooks.service.MAX_ENDPOINTS", 2)
    body, headers = {"url": "https://93.184.216.34/hook"}, bearer(key_of(services, "search"))
    made = [client.post("/v1/webhooks", json=body, headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in made] == [200, 200, 403]
    client.delete(f"/v1/webhooks/{made[0].json()['id']}", headers=headers).raise_for_status()
    assert client.post("/v1/webhooks", json=body, headers=headers).status_code == 200
