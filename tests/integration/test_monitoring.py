"""`/metrics`, read with Prometheus's own parser."""

import re
import threading
from pathlib import Path

import anyio
import anyio.to_thread
import httpx2
import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update
from structlog.testing import CapturingLogger

from app import exception_handlers
from app.database import database_now
from app.files.service import Files
from app.jobs.states import Status
from app.jobs.tables import Job
from app.main import create_app
from app.services import Services
from app.settings import Settings
from app.webhooks import repository as webhooks
from app.webhooks.tables import WebhookDelivery, WebhookEndpoint
from tests.helpers.api import error_of, key_of, upload
from tests.helpers.jobs import make_job

RULES = Path(__file__).parents[2] / "docs" / "alerts.yml"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(client: TestClient) -> Samples:
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value_of(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def test_metrics_show_the_state_of_the_installation(client: TestClient, services: Services) -> None:
    samples_before = scrape(client)
    assert (
        value_of(samples_before, "dpo_jobs", status="queued")
        == value_of(samples_before, "dpo_queue_oldest_seconds")
        == 0
    )
    old = make_job(services, name="old")
    make_job(services, name="new")
    make_job(services, name="paused", paused=True)
    lease = {"status": Status.RUNNING, "lease_owner": "gpu@a:1", "attempt": 3}
    make_job(services, name="held", **lease, progress={"tokens_per_second": 40.5}, metrics={"peak_memory_bytes": 7e9})
    make_job(services, name="lost", **lease, progress={"tokens_per_second": 2.0})
    make_job(services, name="done", status=Status.SUCCEEDED)
    with services.database.write() as session:
        times = {"old": {"created_at": database_now() - 100}}
        session.execute(update(Job).where(Job.id == old).values(**times["old"]))
        session.execute(update(Job).where(Job.id.endswith("-held")).values(lease_expires_at=database_now() + 10))
        session.execute(update(Job).where(Job.id.endswith("-lost")).values(lease_expires_at=database_now() - 1))
        session.add(
            WebhookEndpoint(
                id="whe-1", project="default", url="https://example.com/", events=["fine_tuning.job.failed"],
                sealed_secret="", created_at=database_now(),
            )
        )  # fmt: skip
        session.flush()
        webhooks.enqueue(session, "default", "fine_tuning.job.failed", {})
        session.flush()
        session.execute(update(WebhookDelivery).values(eligible_at=database_now() - 30))
    samples = scrape(client)
    by_status = {labels[0][1]: value for (name, labels), value in samples.items() if name == "dpo_jobs"}
    assert by_status == {
        "validating_files": 0, "queued": 2, "paused": 1, "running": 2, "succeeded": 1, "failed": 0, "cancelled": 0,
    }  # fmt: skip
    assert 100 <= value_of(samples, "dpo_queue_oldest_seconds") < 160
    assert (value_of(samples, "dpo_leases", state="held"), value_of(samples, "dpo_leases", state="expired")) == (1, 1)
    assert value_of(samples, "dpo_job_attempts_total") == 6
    assert value_of(samples, "dpo_training_tokens_per_second") == 42.5
    assert value_of(samples, "dpo_training_peak_memory_bytes") == 7e9
    assert value_of(samples, "dpo_webhooks_due") == 1 and 30 <= value_of(samples, "dpo_webhook_lag_seconds") < 90


def test_requests_are_counted_by_route(client: TestClient, services: Services) -> None:
    file_id = upload(client)
    for _ in range(3):
        client.get(f"/v1/files/{file_id}")
    client.get("/v1/files/file-none")
    client.get("/v1/files", headers={"Authorization": "Bearer wrong"})
    for method in ("BREW", "STEEP"):
        client.request(method, "/v1/files")
    samples = scrape(client)
    route = "/v1/files/{file_id}"
    count = "dpo_http_request_seconds_count"
    assert value_of(samples, count, method="GET", route=route, status="200") == 3
    assert value_of(samples, count, method="GET", route=route, status="404") == 1
    assert value_of(samples, count, method="GET", route="none", status="401") == 1
    assert value_of(samples, count, method="POST", route="/v1/files", status="200") == 1
    assert {dict(labels)["method"] for name, labels in samples if name == count} == {"GET", "POST", "other"}
    error_of(client.get("/metrics", headers={"Authorization": "Bearer wrong"}), 401)
    stranger = {"Authorization": f"Bearer {key_of(services, 'a-project-of-its-own')}"}
    text = client.get("/metrics", headers=stranger).text
    assert file_id not in text and "default" not in text and "a-project-of-its-own" not in text


def test_the_alert_rules_name_existing_metrics(client: TestClient) -> None:
    client.get("/v1/files")
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    exported = {(name, *labels) for name, labels in scrape(client)}
    for rule in rules:
        references = re.findall(r"(dpo_\w+)(?:\{(\w+)=\"(\w+)\"\})?", rule["expr"])
        assert references, rule
        for name, label, value in references:
            assert any(name == metric[0] and (not label or (label, value) in metric[1:]) for metric in exported), rule[
                "expr"
            ]


def test_a_failure_is_counted_and_found_in_the_log_by_its_id(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [client.get(path).headers["x-request-id"] for path in ("/v1/files", "/v1/files", "/v1/nothing", "/healthz")]
    assert len(set(ids)) == 4 and all(identifier.startswith("req_") for identifier in ids)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    log = CapturingLogger()
    monkeypatch.setattr(exception_handlers, "log", log)
    monkeypatch.setattr(Files, "page", fail)
    answer = client.get("/v1/files")
    error = error_of(answer, 500)
    request_id = answer.headers["x-request-id"]
    assert request_id in error["message"] and "a bug" not in answer.text
    (call,) = log.calls
    assert call.kwargs["request"] == request_id and str(call.kwargs["exc_info"]) == "a bug"
    assert (
        value_of(scrape(client), "dpo_http_request_seconds_count", method="GET", route="/v1/files", status="500") == 1
    )


def test_the_probe_of_life_waits_for_no_thread(services: Services, settings: Settings) -> None:
    """All threads that answer requests are busy. `/healthz` answers all the same."""
    busy, release = threading.Barrier(3), threading.Event()

    def block() -> None:
        busy.wait()
        release.wait()

    async def probe() -> int:
        limiter = anyio.to_thread.current_default_thread_limiter()
        limiter.total_tokens = 2
        transport = httpx2.ASGITransport(create_app(settings))
        async with anyio.create_task_group() as tasks, httpx2.AsyncClient(transport=transport) as http:
            for _ in range(2):
                tasks.start_soon(anyio.to_thread.run_sync, block)
            while busy.n_waiting < 2:
                await anyio.sleep(0.01)
            busy.wait()
            answer = await http.get("http://localhost/healthz")
            release.set()
        return answer.status_code

    assert anyio.run(probe) == 200
