"""Faults of the object store, a disk and the database stop work for a while. They are never taken for lost attempts."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pytest
from fastapi.testclient import TestClient
from obstore.exceptions import BaseError
from sqlalchemy import Connection, event, select, update
from sqlalchemy.exc import OperationalError

from app import work_queue
from app.broker import Lane
from app.database import database_now, now
from app.derived_artifacts import repository as artifacts
from app.derived_artifacts.tables import DerivedArtifact
from app.jobs import queue as job_queue
from app.jobs.queue import JOBS
from app.jobs.states import Status
from app.jobs.tables import Job
from app.services import Services
from app.spec.job import JobSpec
from app.storage import PROBE_KEY, Storage
from app.work_queue import LONGEST_SETBACK_SECONDS, Queued, setback_pause
from app.workers import repository as workers
from tests.faults.proxy import Proxy
from tests.helpers.api import ROW, upload
from tests.helpers.jobs import check_files, claim, expire, get, make_job
from tests.helpers.reader import READER
from tests.helpers.servers import admin, s3, wait_until
from worker import lease as lease_module
from worker.base_models import BaseModels
from worker.derived_artifacts import make_artifact
from worker.device_health import DeviceHealth
from worker.lease import JobLease, LeaseLost
from worker.processes import ForkServer
from worker.reaper import Reaper
from worker.store_health import StoreHealth
from worker.training_run import Training
from worker.work import work_folder

Attempt = Callable[[Services, str], Queued]
"""Makes an attempt at work that reads the file of an id. Returns the row of the work after it."""


def _job(services: Services, file_id: str, status: Status) -> str:
    """The job that reads the file; it is made at the first call."""
    with services.database.read() as session:
        job_id = session.scalar(select(Job.id).where(Job.training_file == file_id))
    if job_id is None:
        spec = JobSpec(model="tiny", training_file=file_id).resolved().model_dump(mode="json")
        job_id = make_job(services, training_file=file_id, status=status, spec=spec)
    return job_id


def training(services: Services, file_id: str) -> Queued:
    job_id = _job(services, file_id, Status.QUEUED)
    job = claim(services)
    assert job is not None
    base_models, stopping = BaseModels(services.settings), threading.Event()
    Training(services, base_models, job, stopping, ForkServer(), DeviceHealth("cpu")).run()
    row = get(services, job_id)
    assert row.status == Status.QUEUED
    return row


def check_of_files(services: Services, file_id: str) -> Queued:
    job_id = _job(services, file_id, Status.VALIDATING)
    check_files(services)
    row = get(services, job_id)
    assert row.status == Status.VALIDATING
    return row


def report(services: Services, file_id: str) -> Queued:
    with services.database.write() as session:
        artifacts.ensure(
            session, artifacts.REPORT, file_id, project="default", owner=file_id, arguments={"file_id": file_id}
        )
    with services.database.write() as session:
        artifact = artifacts.claim(session, "test", [])
    assert artifact is not None
    make_artifact(services, BaseModels(services.settings), READER, artifact, threading.Event())
    with services.database.read() as session:
        row = session.get_one(DerivedArtifact, artifact.id)
    assert row.status == "pending"
    return row


@contextmanager
def broken_store(services: Services, file_id: str) -> Iterator[None]:
    """The object of the file cannot be opened: its name leads to itself."""
    path = services.settings.home / "objects" / "files" / file_id
    content = path.read_bytes()
    path.unlink()
    path.symlink_to(path)
    yield
    path.unlink()
    path.write_bytes(content)


@contextmanager
def full_disk(services: Services, _file_id: str) -> Iterator[None]:
    """The worker's folder is on a full disk, a real one. It has room for a page, and the file takes more."""
    folder = work_folder(services)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


ATTEMPTS = pytest.mark.parametrize("attempt", [training, check_of_files, report])
OUTAGES = pytest.mark.parametrize(
    "outage",
    [
        broken_store,
        pytest.param(full_disk, marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount a disk")),
    ],
)


@ATTEMPTS
@OUTAGES
def test_work_that_meets_an_outage_is_given_back_uncounted(
    client: TestClient,
    services: Services,
    attempt: Attempt,
    outage: Callable[[Services, str], AbstractContextManager[None]],
) -> None:
    file_id = upload(client, 200 * ROW)
    with outage(services, file_id):
        row = attempt(services, file_id)
    assert (row.lease_owner, row.lost_attempts, row.setbacks) == (None, 0, 1)
    with services.database.read() as session:
        assert 0 < row.eligible_at - now(session) <= setback_pause(1)


@ATTEMPTS
def test_work_outlives_any_number_of_setbacks(client: TestClient, services: Services, attempt: Attempt) -> None:
    """Three lost attempts give work up. A long outage causes many setbacks, with pauses up to five minutes."""
    file_id = upload(client)
    with broken_store(services, file_id):
        row = attempt(services, file_id)
        with services.database.write() as session:
            session.execute(update(type(row)).values(setbacks=40, eligible_at=0.0))
        row = attempt(services, file_id)
    assert (row.lease_owner, row.lost_attempts, row.setbacks) == (None, 0, 41)
    with services.database.read() as session:
        assert LONGEST_SETBACK_SECONDS - 10 < row.eligible_at - now(session) <= LONGEST_SETBACK_SECONDS
    assert claim_again(services, row) is None, "its pause is not over"


def claim_again(services: Services, row: Queued) -> Queued | None:
    with services.database.write() as session:
        if isinstance(row, DerivedArtifact):
            return artifacts.claim(session, "test", [])
        assert isinstance(row, Job)
        return job_queue.claim(session, Status(row.status), "test")


def test_a_result_waits_for_the_store(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint has cost hours. The attempt tries again while the store is away, and stores it when it is back."""
    monkeypatch.setattr(lease_module, "MOST_PAUSE_SECONDS", 0.1)
    make_job(services)
    job = claim(services)
    assert job is not None
    folder = services.settings.home / "objects" / "jobs"
    folder.symlink_to(folder)
    tries = 0

    def put() -> None:
        nonlocal tries
        tries += 1
        if tries == 3:
            folder.unlink()
        services.storage.put_bytes("jobs/result", b"weights")

    with JobLease(services.database, job.id, job.attempt) as lease:
        lease.outlast(put)
    assert (tries, services.storage.read("jobs/result")) == (3, b"weights")


def test_a_result_waits_no_longer_than_its_attempt(services: Services) -> None:
    """A worker that drains, and an attempt that has lost its lease, leave a store that does not answer."""
    make_job(services)
    job = claim(services)
    assert job is not None
    folder = services.settings.home / "objects" / "jobs"
    folder.symlink_to(folder)
    stopping, put = threading.Event(), partial(services.storage.put_bytes, "jobs/result", b"weights")
    stopping.set()
    with JobLease(services.database, job.id, job.attempt, stopping.is_set) as lease, pytest.raises(BaseError):
        lease.outlast(put)
    with JobLease(services.database, job.id, job.attempt) as lease:
        lease._lost.set()
        with pytest.raises(LeaseLost):
            lease.outlast(put)


def test_a_worker_claims_nothing_while_the_store_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks once, within seconds: the store's client would try for minutes."""
    with s3() as environment:
        port = int(environment["AWS_ENDPOINT_URL"].rpartition(":")[2])
        with Proxy("objects", port) as proxy:
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
            health = StoreHealth(Storage(environment["DPO_STORAGE_URL"]))
            assert health.usable() and health.problem is None
            outages: list[Callable[[], None]] = [
                lambda: setattr(proxy, "refuse", True),
                lambda: setattr(proxy, "busy", True),
                lambda: proxy.hold(True),
            ]
            for begin in outages:
                begin()
                proxy.cut()
                assert health.usable(), "it is trusted for a while after an answer"
                health.doubt()
                assert not health.usable() and health.problem is not None
                proxy.heal()
                proxy.cut()
                assert health.usable() and health.problem is None


@contextmanager
def read_only(services: Services) -> Iterator[None]:
    """The database takes no writes for a while, as a server that has become a standby."""
    engine = services.database.engine
    if engine.dialect.name == "sqlite":
        refuse, allow = partial(_set_query_only, "ON"), partial(_set_query_only, "OFF")
        event.listen(engine, "begin", refuse)
        event.listen(engine, "rollback", allow)
        yield
        event.remove(engine, "begin", refuse)
        return
    url = engine.url.render_as_string(hide_password=False)
    change = f"ALTER DATABASE {engine.url.database} SET default_transaction_read_only"
    as_writer = f"{url}?options=-cdefault_transaction_read_only%3Doff"
    admin(as_writer, f"{change} = on")
    services.database.close()  # a standby has ended all sessions
    yield
    admin(as_writer, f"{change} = off")
    # The sessions of the standby live on. The service must leave them by itself.


def _set_query_only(value: str, connection: Connection) -> None:
    connection.exec_driver_sql(f"PRAGMA query_only = {value}")


def test_a_read_only_database_costs_no_attempt(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt waits, as for a restart of the database, and goes on when it takes writes again."""
    monkeypatch.setattr(work_queue, "HEARTBEAT_SECONDS", 0.05)
    job_id = make_job(services)
    job = claim(services)
    assert job is not None
    with JobLease(services.database, job_id, job.attempt) as lease:
        with read_only(services):
            with pytest.raises(OperationalError), services.database.write() as session:
                JOBS.write(session, job_id, job.attempt, stage="sft")
            writer = threading.Thread(
                target=lease.write, args=[lambda session: JOBS.write(session, job_id, job.attempt, stage="dpo")]
            )
            writer.start()
            writer.join(0.5)
            assert writer.is_alive() and not lease.lost
        writer.join(60)
        assert not writer.is_alive() and not lease.lost
    assert get(services, job_id).stage == "dpo"


def test_leases_that_ran_out_in_an_outage_are_not_counted_as_lost(services: Services) -> None:
    """While the database only answers, nobody can renew a lease. Afterwards everyone first gets the time to do so."""
    job_id = make_job(services)
    assert claim(services)
    reaper = Reaper(services)
    reaper.inspect()

    def inspect_later() -> None:
        """Inspect as if the reaper had been in touch for long, and had seen each lease for long."""
        reaper._in_touch_since -= work_queue.LEASE_SECONDS
        reaper._first_seen = {lease: first - 60.0 for lease, first in reaper._first_seen.items()}
        reaper.inspect()

    expire(services, job_id)
    reaper.inspect()
    with read_only(services):
        inspect_later()
    reaper.inspect()
    assert get(services, job_id).status == Status.RUNNING, "its worker may renew it now"
    inspect_later()
    row = get(services, job_id)
    assert (row.status, row.lost_attempts, row.setbacks) == (Status.QUEUED, 0, 1)
    with services.database.write() as session:
        session.execute(update(Job).values(eligible_at=0.0))
    assert claim(services)
    with services.database.write() as session:
        session.execute(update(Job).values(lease_expires_at=database_now()))
    time.sleep(0.1)
    reaper.inspect()
    inspect_later()
    row = get(services, job_id)
    assert (row.status, row.lost_attempts, row.setbacks) == (Status.QUEUED, 1, 1), "this one ran out after the outage"


def test_an_api_beside_a_read_only_database_says_so(client: TestClient, services: Services) -> None:
    with read_only(services), read_only(client.app.state.services):  # type: ignore[attr-defined]
        answer = client.post("/v1/projects", json={"id": "other"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
        ready = client.get("/readyz")
        assert (ready.status_code, list(ready.json()["problems"])) == (503, ["database_writes"])
        assert client.get("/v1/models").status_code == 200
    wait_until(lambda: client.get("/readyz").status_code == 200, "the end of the old sessions")
    assert client.post("/v1/projects", json={"id": "other"}).status_code == 200


def test_readiness_tells_a_store_that_takes_no_writes_from_one_that_is_away(
    client: TestClient, services: Services
) -> None:
    objects = services.settings.home / "objects"
    (objects / PROBE_KEY).mkdir(parents=True)
    ready = client.get("/readyz")
    assert (ready.status_code, list(ready.json()["problems"])) == (503, ["storage_writes"])
    (objects / PROBE_KEY).rmdir()
    assert client.get("/readyz").status_code == 200
    (objects / PROBE_KEY).unlink()
    shutil.rmtree(objects)
    objects.symlink_to(objects)
    ready = client.get("/readyz")
    assert (ready.status_code, list(ready.json()["problems"])) == (503, ["storage"])


def test_operators_see_what_an_outage_stops(client: TestClient, services: Services) -> None:
    make_job(services, setbacks=2)
    with services.database.write() as session:
        workers.report(session, "gpu@a", Lane.GPU, ["tiny"], {"device": None, "store_problem": "it does not answer"})
        workers.report(session, "cpu@a", Lane.CPU, [], {})
    metrics = client.get("/metrics").text
    assert "dpo_workers_without_store 1.0" in metrics and "dpo_jobs_set_back 1.0" in metrics
    assert client.get("/readyz").json()["warnings"] == {
        "storage": "1 of 2 workers cannot reach the object store and claim no jobs"
    }
