"""`/metrics`, read with Prometheus's own parser."""

import json
import re
import shutil
import subprocess
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
from app.derived_artifacts import repository as artifacts
from app.files.service import Files
from app.jobs.states import Status
from app.jobs.tables import Job
from app.keys.schemas import Scope
from app.main import create_app
from app.services import Services
from app.settings import Settings
from app.usage import repository as usage
from app.webhooks import repository as webhooks
from app.webhooks.tables import WebhookDelivery, WebhookEndpoint
from app.workers import repository as workers
from tests.helpers.api import error_of, key_of, upload
from tests.helpers.jobs import make_job

DOCS = Path(__file__).parents[2] / "docs"
RULES, DASHBOARD, TABLE = DOCS / "alerts.yml", DOCS / "grafana.json", DOCS / "deployment.md"
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
    assert value_of(samples, "dpo_webhooks_failing") == value_of(samples, "dpo_webhook_endpoints_disabled") == 0
    with services.database.write() as session:
        session.execute(update(WebhookDelivery).values(attempt=2))
    assert value_of(scrape(client), "dpo_webhooks_failing") == 1
    with services.database.write() as session:
        webhooks.disable(session, "whe-1", "it answered 410 Gone")
    assert value_of(scrape(client), "dpo_webhook_endpoints_disabled") == 1
    assert value_of(samples, "dpo_webhooks_due") == 1 and 30 <= value_of(samples, "dpo_webhook_lag_seconds") < 90


def test_ended_jobs_are_counted_by_code_project_base_and_worker(client: TestClient, services: Services) -> None:
    lost = {"code": "worker_lost", "message": "", "param": None}
    for number, project in enumerate(("default", "default", "other")):
        make_job(services, name=f"f{number}", project=project, status=Status.FAILED, error=lost, worker="gpu@h1")
    make_job(services, name="s", status=Status.SUCCEEDED, base_model="large", worker="gpu@h2")
    for _ in range(2):  # each scrape counts on from the last
        samples = scrape(client)
        failed = {"status": "failed", "code": "worker_lost"}
        assert value_of(samples, "dpo_jobs_ended_total", **failed, base_model="tiny") == 3
        assert value_of(samples, "dpo_jobs_ended_total", status="succeeded", code="", base_model="large") == 1
        assert value_of(samples, "dpo_project_jobs_ended_total", **failed, project="default") == 2
        assert value_of(samples, "dpo_project_jobs_ended_total", **failed, project="other") == 1
        assert value_of(samples, "dpo_worker_jobs_ended_total", **failed, worker="gpu@h1") == 3
        assert value_of(samples, "dpo_worker_jobs_ended_total", status="succeeded", code="", worker="gpu@h2") == 1


def test_workers_tell_of_their_disks_and_gpus(client: TestClient, services: Services) -> None:
    with services.database.write() as session:
        use = {"utilization": 0.25, "memory_bytes": 7}
        workers.report(session, "gpu@h1:1", "gpu", ["tiny"], {"disk_free_bytes": 5, "gpu_use": use})
        workers.report(session, "cpu@h1:2", "cpu", [], {"disk_free_bytes": 6})
    samples = scrape(client)
    assert value_of(samples, "dpo_worker_disk_free_bytes", worker="gpu@h1:1") == 5
    assert value_of(samples, "dpo_worker_disk_free_bytes", worker="cpu@h1:2") == 6
    assert value_of(samples, "dpo_worker_gpu_utilization", worker="gpu@h1:1") == 0.25
    assert value_of(samples, "dpo_worker_gpu_memory_bytes", worker="gpu@h1:1") == 7


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
    stranger = {"Authorization": f"Bearer {key_of(services, 'a-project-of-its-own', Scope.READ)}"}
    make_job(services, status=Status.FAILED, error={"code": "worker_lost", "message": "", "param": None})
    usage.measure_storage(services.database, float("nan"))
    assert 'project="default"' in client.get("/metrics").text, "an administrator sees projects"
    text = client.get("/metrics", headers=stranger).text
    assert file_id not in text and "default" not in text and "a-project-of-its-own" not in text


REFERENCE = re.compile(r"(dpo_\w+)(?:\{(\w+)=\"(\w+)\"\})?")
"""A series in an expression, with the label that it asks for."""


@pytest.fixture
def exported(client: TestClient, services: Services) -> set[tuple[str, ...]]:
    """The series of an installation where everything has happened, each with its labels."""
    client.get("/v1/files")
    for code in ("worker_lost", "out_of_memory"):
        error = {"code": code, "message": "", "param": None}
        make_job(services, name=code, status=Status.FAILED, error=error, worker="gpu@h")
    usage.measure_storage(services.database, float("nan"))
    with services.database.write() as session:
        use = {"utilization": 0.25, "memory_bytes": 7}
        workers.report(session, "gpu@h1:1", "gpu", ["tiny"], {"disk_free_bytes": 5, "gpu_use": use})
        artifacts.ensure(session, artifacts.REPORT, "file-1", project="default", owner="file-1", arguments={})
    return {(name, *map(str, labels)) for name, labels in scrape(client)}


def expressions() -> list[tuple[str, str]]:
    """(where it stands, the expression) of each rule and each panel that the documentation ships."""
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [(rule["alert"], rule["expr"]) for rule in rules] + [
        (panel["title"], target["expr"]) for panel in panels for target in panel["targets"]
    ]


def test_rules_and_panels_name_existing_series(exported: set[tuple[str, ...]]) -> None:
    for place, expression in expressions():
        references = REFERENCE.findall(expression)
        assert references, place
        for name, label, value in references:
            wanted = str((label, value))
            assert any(name == series[0] and (not label or wanted in series[1:]) for series in exported), expression


def test_every_series_of_the_service_is_on_the_dashboard_or_in_a_rule(exported: set[tuple[str, ...]]) -> None:
    named = {name for _, expression in expressions() for name, _, _ in REFERENCE.findall(expression)}
    families = {re.sub("_(bucket|sum|count|created)$", "", series[0]) for series in exported}
    unseen = {family for family in families if family.startswith("dpo_") and not any(family in name for name in named)}
    assert unseen == {
        "dpo_job_attempts_total", "dpo_project_jobs_ended_total", "dpo_project_trained_tokens_total",
        "dpo_training_peak_memory_bytes",
    }, "for questions of the moment"  # fmt: skip


def test_each_rule_is_explained(exported: set[tuple[str, ...]]) -> None:
    """The table says what it means and what to do."""
    explained = set(re.findall(r"^\| `(Dpo\w+)` \|", TABLE.read_text(), re.MULTILINE))
    assert explained == {rule["alert"] for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]}


def test_promtool_accepts_the_rules() -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed")
    subprocess.run([program, "check", "rules", str(RULES)], check=True)


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
