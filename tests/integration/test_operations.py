"""An operator stops claims and writes for a while: nothing begins, and nothing that runs is harmed."""

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from app.cli.main import cli
from app.database import now
from app.jobs.queue import heartbeat
from app.jobs.states import Status
from app.keys.schemas import Scope
from app.services import Services
from app.spec.version import SPEC_VERSION
from app.workers import repository as workers
from tests.helpers.api import error_of, key_of, upload
from tests.helpers.jobs import claim, end, make_job
from worker.webhooks import Sender
from worker.worker_pool import WorkerPool


@pytest.fixture
def pool(cpu_worker: WorkerPool) -> WorkerPool:
    """A CPU worker that has registered."""
    cpu_worker._register()
    return cpu_worker


def checks(services: Services, pool: WorkerPool, name: str) -> bool:
    """Whether the worker checks the files of a waiting job."""
    make_job(services, name=name, status=Status.VALIDATING)
    return pool._work_once()


def test_a_cordoned_worker_starts_no_job(client: TestClient, services: Services, pool: WorkerPool) -> None:
    (listed,) = client.get("/v1/workers").json()["data"]
    assert listed["id"] == pool.owner and not listed["cordoned"] and listed["details"]["disk_free_bytes"] > 0
    assert client.post(f"/v1/workers/{pool.owner}", json={"cordoned": True}).json()["cordoned"]
    assert not checks(services, pool, "a")
    pool._register()
    assert client.get("/v1/workers").json()["data"][0]["cordoned"], "it stays so when the worker reports"
    client.post(f"/v1/workers/{pool.owner}", json={"cordoned": False})
    assert checks(services, pool, "b")
    assert error_of(client.post("/v1/workers/gpu@none:1", json={"cordoned": True}), 404)["code"] == "worker_not_found"
    writes = {"Authorization": f"Bearer {key_of(services, 'default', Scope.WRITE)}"}
    error_of(client.get("/v1/workers", headers=writes), 403)
    error_of(client.post("/v1/operations", json={"claims_paused": True}, headers=writes), 403)


def test_a_forecast_leaves_out_cordoned_workers(client: TestClient, services: Services) -> None:
    job_id = make_job(services)
    with services.database.write() as session:
        workers.report(session, "gpu@h:1", "gpu", ["tiny"], {"spec_version": SPEC_VERSION})
    path = f"/v1/fine_tuning/jobs/{job_id}"
    assert client.get(path).json()["estimated_start"] is not None
    client.post("/v1/workers/gpu@h:1", json={"cordoned": True})
    assert client.get(path).json()["estimated_start"] is None


def test_paused_claims_let_running_jobs_end(client: TestClient, services: Services, pool: WorkerPool) -> None:
    make_job(services, name="runs")
    running = claim(services)
    assert running is not None
    waiting = make_job(services, name="waits")
    assert client.post("/v1/operations", json={"claims_paused": True}).json()["claims_paused"]
    assert not checks(services, pool, "a")
    waits_for = client.get(f"/v1/fine_tuning/jobs/{waiting}").json()["waiting_for"]
    assert waits_for == "the operator: workers start no jobs at present"
    body = {"model": "tiny", "training_file": upload(client)}
    assert client.post("/v1/fine_tuning/jobs", json=body).status_code == 200, "jobs may still be created"
    assert end(services, running.id, running.attempt)
    client.post("/v1/operations", json={"claims_paused": False})
    assert client.get(f"/v1/fine_tuning/jobs/{waiting}").json()["waiting_for"] != waits_for
    assert checks(services, pool, "b")


def test_nothing_changes_while_the_service_is_read_only(
    client: TestClient, services: Services, pool: WorkerPool
) -> None:
    file_id = upload(client)
    body = {"model": "tiny", "training_file": file_id}
    make_job(services, name="runs")
    running = claim(services)
    assert running is not None
    client.post("/v1/operations", json={"read_only": "a copy is made until noon"})
    for refused in (
        client.post("/v1/fine_tuning/jobs", json=body),
        client.delete(f"/v1/files/{file_id}"),
        client.post("/v1/files", files={"file": ("p.jsonl", b"{}")}, data={"purpose": "fine-tune"}),
        client.post(f"/v1/fine_tuning/jobs/{running.id}/cancel"),
        client.post("/v1/keys", json={"name": "x"}),
    ):
        error = error_of(refused, 503)
        assert error["code"] == "read_only" and "until noon" in error["message"]
        assert refused.headers["Retry-After"]
    assert client.get(f"/v1/files/{file_id}").status_code == 200
    assert not checks(services, pool, "a")
    assert Sender(services, pool.stopping, "test").send_due() == 0
    with services.database.write() as session:
        assert heartbeat(session, running.id, running.attempt) is not None, "running jobs go on"
        assert now(session) > 0
    assert client.post("/v1/operations", json={"read_only": None}).json() == {
        "object": "operations", "claims_paused": False, "read_only": None,
    }  # fmt: skip
    assert client.post("/v1/fine_tuning/jobs", json=body).status_code == 200
    assert checks(services, pool, "b")


def test_the_command_line_does_the_same(
    client: TestClient, services: Services, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.cli.operations.local", lambda: services)
    run = CliRunner()

    def dpo(*arguments: str) -> str:
        result = run.invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert pool.owner in dpo("workers", "list", "--json")
    dpo("workers", "cordon", pool.owner)
    assert client.get("/v1/workers").json()["data"][0]["cordoned"]
    dpo("workers", "uncordon", pool.owner)
    dpo("workers", "pause")
    dpo("read-only", "a copy is made")
    assert client.get("/v1/operations").json() == {
        "object": "operations", "claims_paused": True, "read_only": "a copy is made",
    }  # fmt: skip
    dpo("workers", "resume")
    dpo("read-only", "--off")
    assert not client.get("/v1/workers").json()["data"][0]["cordoned"]
    state = client.get("/v1/operations").json()
    assert not state["claims_paused"] and state["read_only"] is None
