"""Leases and the state machine, on SQLite and PostgreSQL: guarded transitions, stale workers and clock changes."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app import work_queue
from app.database import database_now, now
from app.idempotency.service import RequestIdentity
from app.jobs import queue as job_queue
from app.jobs import transitions
from app.jobs.queue import JOBS
from app.jobs.schemas import JobObject
from app.jobs.states import ACTIVE, TRANSITIONS, Actor, Status
from app.jobs.tables import Checkpoint, Job, JobEvent
from app.services import Services
from app.spec.json_types import JsonObject
from app.spec.version import SPEC_VERSION
from app.workers import repository as workers
from tests.helpers.jobs import claim, end, expire, get, make_job
from worker.base_models import BaseModels
from worker.device_health import DeviceHealth
from worker.housekeeping import purge_deleted_files
from worker.lease import JobLease
from worker.processes import ForkServer
from worker.reaper import Reaper, reap
from worker.trainer.events import Event, Metrics, Notice, StageBegan, Working
from worker.training_run import Training


def test_no_transition_leaves_a_final_state() -> None:
    assert {edge.source for edge in TRANSITIONS.values()} == set(ACTIVE)
    assert all(
        edge.fenced == (Actor.API not in edge.actors) or edge.target == Status.RUNNING for edge in TRANSITIONS.values()
    )


def test_priority_comes_before_age(services: Services) -> None:
    old = make_job(services, name="old")
    urgent = make_job(services, name="urgent", priority=5)
    new = make_job(services, name="new")
    with services.database.read() as session:
        assert [job.id for job in job_queue.waiting(session)] == [urgent, old, new]
    order = [job.id for job in (claim(services), claim(services), claim(services)) if job]
    assert order == [urgent, old, new]
    assert claim(services) is None


def test_a_worker_claims_only_jobs_whose_base_model_it_serves(services: Services) -> None:
    job_id = make_job(services, base_model="org/big_model")
    for pattern in ("tiny", "org/bigXmodel", "big_model", "%", "other/*"):
        assert claim(services, [pattern]) is None
    assert claim(services, []) is None
    claimed = claim(services, ["tiny", "org/*"])
    assert claimed is not None and claimed.id == job_id


def test_only_one_of_many_workers_claims_a_job(services: Services) -> None:
    make_job(services)
    claimed: list[Job | None] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        claimed.append(claim(services))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 8
    assert sum(job is not None for job in claimed) == 1


def test_an_expired_lease_is_taken_away_and_the_stale_attempt_writes_nothing(services: Services) -> None:
    job_id = make_job(services)
    first = claim(services)
    assert first is not None
    reap(services.database)
    assert get(services, job_id).status == Status.RUNNING, "a valid lease stays"
    expire(services, job_id)
    reap(services.database)
    assert get(services, job_id).status == Status.QUEUED
    with services.database.write() as session:
        session.execute(update(Job).values(eligible_at=0.0))
    second = claim(services)
    assert second is not None and second.attempt == first.attempt + 1
    with services.database.write() as session:
        assert not job_queue.heartbeat(session, job_id, first.attempt)
        assert not JOBS.write(session, job_id, first.attempt, stage="stale")
        assert job_queue.heartbeat(session, job_id, second.attempt)
    assert not end(services, job_id, first.attempt)
    assert get(services, job_id).stage is None
    assert end(services, job_id, second.attempt)


def test_a_job_waits_after_a_lost_attempt(services: Services) -> None:
    job_id = make_job(services)
    job = claim(services)
    assert job is not None
    expire(services, job_id)
    reap(services.database)
    with services.database.read() as session:
        assert session.get_one(Job, job_id).eligible_at > now(session) - 1.0
    with services.database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(eligible_at=database_now() + 20))
    assert claim(services) is None


def test_after_an_outage_every_lease_gets_its_full_time_again(services: Services) -> None:
    """All leases expired while the database was away. Their holders had no time to renew them."""
    reaper = Reaper(services)
    monotonic = 1000.0
    assert reaper.in_touch(monotonic, 5000.0) == 0.0, "a new reaper cannot know about an earlier outage"
    for _ in range(10):
        monotonic += 2.0
        in_touch = reaper.in_touch(monotonic, monotonic + 4000.0)
    assert in_touch == 20.0
    monotonic += 30.0
    assert reaper.in_touch(monotonic, monotonic + 4000.0) == 0.0, "no look for 30 s: the database was away"
    monotonic += 2.0
    assert reaper.in_touch(monotonic, monotonic + 4000.0) == 2.0
    for jump in (300.0, -300.0):
        monotonic += 2.0
        assert reaper.in_touch(monotonic, monotonic + 4000.0 + jump) == 0.0, "the database's clock was set"
        monotonic += 2.0
        assert reaper.in_touch(monotonic, monotonic + 4000.0) == 0.0, "and set right again"


def test_a_fresh_reaper_takes_no_lease(services: Services) -> None:
    job_id = make_job(services)
    assert claim(services)
    expire(services, job_id)
    reaper = Reaper(services)
    reaper.inspect()
    assert get(services, job_id).status == Status.RUNNING
    reaper._in_touch_since -= work_queue.LEASE_SECONDS
    reaper.inspect()
    assert get(services, job_id).status == Status.RUNNING, "it has seen the lease only once"
    reaper._first_seen = {lease: first - 60.0 for lease, first in reaper._first_seen.items()}
    reaper.inspect()
    assert get(services, job_id).status == Status.QUEUED


def test_a_renewed_lease_is_not_taken_after_a_clock_error(services: Services) -> None:
    """The clock was wrong between two inspections, and a heartbeat was written at that moment."""
    job_id = make_job(services)
    job = claim(services)
    assert job is not None
    reaper = Reaper(services)
    reaper.inspect()
    reaper._in_touch_since -= work_queue.LEASE_SECONDS
    for clock_error in (-300.0, 300.0):
        reaper._first_seen = {lease: first - 60.0 for lease, first in reaper._first_seen.items()}
        with services.database.write() as session:
            lease = database_now() + clock_error
            session.execute(update(Job).where(Job.id == job_id).values(lease_expires_at=lease))
        reaper.inspect()
        assert get(services, job_id).status == Status.RUNNING
        with services.database.write() as session:
            assert job_queue.heartbeat(session, job_id, job.attempt)
        reaper.inspect()


@pytest.mark.parametrize("jump", [-300.0, 300.0])
def test_a_clock_change_delays_no_job(services: Services, jump: float) -> None:
    """After the database's clock moves, old times in the rows neither delay a job nor count as training time."""
    job_id = make_job(services)
    job = claim(services)
    assert job is not None

    def set_columns(**columns: object) -> None:
        with services.database.write() as session:
            session.execute(update(Job).values(**columns))

    set_columns(lease_expires_at=Job.lease_expires_at - jump)
    with services.database.write() as session:
        renewed = job_queue.heartbeat(session, job_id, job.attempt)
    assert renewed is not None and renewed.ran_seconds < 5.0
    reap(services.database)
    assert get(services, job_id).status == Status.RUNNING, "renewed by the new time"
    set_columns(lease_expires_at=Job.lease_expires_at - jump)
    reap(services.database)
    assert get(services, job_id).status == Status.QUEUED, "nobody renewed it"
    set_columns(eligible_at=database_now() + 1.0 - jump)
    assert claim(services) is not None


def test_a_lease_that_cannot_be_renewed_is_lost_in_time(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hanging heartbeat must not keep a trainer alive whose job another worker may have claimed."""
    monkeypatch.setattr(JOBS, "lease_seconds", 0.5)
    monkeypatch.setattr(work_queue, "OUTAGE_SECONDS", 0.5)
    monkeypatch.setattr(work_queue, "HEARTBEAT_SECONDS", 0.1)
    job_id = make_job(services)
    job = claim(services)
    assert job is not None
    hang, killed = threading.Event(), threading.Event()
    monkeypatch.setattr(job_queue, "heartbeat", lambda *_: hang.wait(30) and None)
    with JobLease(services.database, job_id, job.attempt) as lease:
        lease.on_lost(killed.set)
        assert killed.wait(10)
        assert lease.lost
    hang.set()


def test_a_cancelled_jobs_lease_is_lost_at_the_next_heartbeat(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_queue, "HEARTBEAT_SECONDS", 0.05)
    job_id = make_job(services)
    job = claim(services)
    assert job is not None
    with JobLease(services.database, job_id, job.attempt) as lease:
        services.jobs.cancel("default", job_id, RequestIdentity("test"))
        assert lease.wait_lost(10)


def test_attempts_without_progress_are_bounded_and_progress_resets_them(services: Services) -> None:
    job_id = make_job(services)
    for number in range(work_queue.MAX_LOST_ATTEMPTS):
        job = claim(services)
        assert job is not None
        if number == 0:  # a checkpoint was written, and two later attempts died before theirs
            with services.database.write() as session:
                JOBS.write(session, job_id, job.attempt, lost_attempts=0)
        expire(services, job_id)
        reap(services.database)
        with services.database.write() as session:
            session.execute(update(Job).values(eligible_at=0.0))
    job = get(services, job_id)
    assert job.status == Status.FAILED
    assert job.error is not None and job.error["code"] == "worker_lost"


def test_a_cancelled_job_stays_cancelled(services: Services) -> None:
    job_id = make_job(services)
    job = claim(services)
    assert job is not None
    assert services.jobs.cancel("default", job_id, RequestIdentity("test")).status == Status.CANCELLED
    with services.database.write() as session:
        assert not job_queue.heartbeat(session, job_id, job.attempt), "its worker learns it from the heartbeat"
    assert not end(services, job_id, job.attempt)
    assert get(services, job_id).status == Status.CANCELLED


def test_every_transition_writes_its_event_or_nothing(services: Services) -> None:
    job_id = make_job(services)
    job = claim(services)
    assert job is not None
    assert not end(services, job_id, job.attempt + 1)
    assert end(services, job_id, job.attempt)
    with services.database.read() as session:
        messages = list(session.scalars(select(JobEvent.message).where(JobEvent.job_id == job_id)))
        assert messages == ["Fine-tuning job started.", "done"]
        assert JobObject.of(session.get_one(Job, job_id)).status == Status.SUCCEEDED


@pytest.mark.parametrize(
    ("source", "target", "actor", "values"),
    [
        (Status.QUEUED, Status.SUCCEEDED, Actor.RUNNER, {}),
        (Status.RUNNING, Status.SUCCEEDED, Actor.API, {}),
        (Status.RUNNING, Status.SUCCEEDED, Actor.RUNNER, {"priority": 9}),
        (Status.SUCCEEDED, Status.RUNNING, Actor.RUNNER, {}),
    ],
)
def test_a_transition_outside_of_the_table_raises(
    services: Services, source: Status, target: Status, actor: Actor, values: dict[str, Any]
) -> None:
    with services.database.write() as session, pytest.raises(ValueError, match=r"may not|does not write"):
        transitions.transition(session, "x", source, target, actor=actor, attempt=1, message="no", **values)


def test_a_deleted_file_keeps_its_bytes_while_a_job_needs_them(services: Services) -> None:
    from app.files.tables import File

    job_id = make_job(services, training_file="file-1")
    services.storage.put_bytes("files/file-1", b"data")
    with services.database.write() as session:
        session.add(
            File(id="file-1", project="default", filename="f", purpose="fine-tune", bytes=4, sha256="", created_at=0.0)
        )
    services.files.delete("default", "file-1")
    purge_deleted_files(services)
    assert services.storage.read("files/file-1") == b"data"
    services.jobs.cancel("default", job_id, RequestIdentity("test"))
    purge_deleted_files(services)
    with pytest.raises(FileNotFoundError):
        services.storage.read("files/file-1")
    purge_deleted_files(services)


def test_events_are_not_written_twice_after_a_lost_answer_to_a_commit(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks after the commit. The runner tries again and finds its events."""
    job_id = make_job(services)
    job = claim(services)
    assert job is not None
    run = training(services, job)
    write, broken = services.database.write, list[bool]()

    @contextmanager
    def breaks_once() -> Iterator[Session]:
        with write() as session:
            yield session
        if not broken:
            broken.append(True)
            raise OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))

    with JobLease(services.database, job_id, job.attempt) as run.lease:
        monkeypatch.setattr(services.database, "write", breaks_once)
        run._relay([Notice("once")])
    with services.database.read() as session:
        messages = list(session.scalars(select(JobEvent.message).where(JobEvent.job_id == job_id)))
    assert broken and messages == ["Fine-tuning job started.", "once"]


def training(services: Services, job: Job) -> Training:
    """An attempt at a claimed job, without its trainer."""
    return Training(services, BaseModels(services.settings), job, threading.Event(), ForkServer(), DeviceHealth("cpu"))


def test_a_job_shows_the_last_value_of_every_metric_of_its_stage(services: Services) -> None:
    """A validation is rare: its values stay until the next, also over a resume, and end with their stage."""
    make_job(services)
    job = claim(services)
    assert job is not None

    def step(number: int, **metrics: float) -> Metrics:
        return Metrics("dpo", number, 10, None, {"loss": number / 10} | metrics)

    attempt = training(services, job)
    attempt.columns([StageBegan("dpo", 8, 2), step(1, **{"eval/loss": 0.5})])
    assert attempt.columns([step(2)])["metrics"] == {"loss": 0.2, "eval/loss": 0.5}
    job.stage, job.metrics = "dpo", {"loss": 0.2, "eval/loss": 0.5}
    resumed = training(services, job)
    resumed.columns([StageBegan("dpo", 8, 2)])
    assert resumed.columns([step(3)])["metrics"] == {"loss": 0.3, "eval/loss": 0.5}
    job.stage = "sft"
    assert training(services, job).columns([StageBegan("dpo", 8, 2), step(1)])["metrics"] == {"loss": 0.1}


def test_a_job_shows_its_stage_and_its_progress_before_the_first_step(services: Services) -> None:
    job_id = make_job(services)
    job = claim(services)
    assert job is not None
    attempt = training(services, job)

    def shown(*events: Event) -> tuple[str | None, JsonObject | None]:
        attempt._relay(list(events))
        current = JobObject.of(get(services, job_id))
        return current.stage, None if current.progress is None else current.progress.model_dump()

    with JobLease(services.database, job_id, job.attempt) as attempt.lease:
        activity = {"name": "tokenizing", "done": 4096, "total": None}
        before = {"step": 0, "total_steps": 0, "seconds_remaining": None, "tokens_per_second": None}
        assert shown(Working("fetching", None, None), Working("tokenizing", 4096, None)) == (
            "sft",
            before | {"activity": activity},
        )
        step = {"step": 3, "total_steps": 9, "seconds_remaining": 1.5, "tokens_per_second": None}
        assert shown(Metrics("sft", 3, 9, 1.5, {"loss": 1.0})) == ("sft", step | {"activity": None})
        activity = {"name": "reference", "done": 5, "total": 8}
        assert shown(Working("reference", 5, 8)) == ("sft", step | {"activity": activity})
        attempt.stop_early()
    queued = JobObject.of(get(services, job_id))
    assert queued.progress is not None and queued.progress.step == 3 and queued.progress.activity is None


def test_the_time_in_which_a_job_waits_for_machines_is_not_its_running_time(services: Services) -> None:
    job_id = make_job(services, timeout_seconds=60, ran_seconds=30.0)
    job = claim(services)
    assert job is not None
    attempt = training(services, job)
    placing, going_on = Working("placing", None, None), Working("tokenizing", None, None)
    with JobLease(services.database, job_id, job.attempt) as attempt.lease:
        attempt._relay([placing])
        attempt.began -= 20.0  # as if it had waited so long
        attempt._seen -= 20.0
        for counts, event in ((False, placing), (True, going_on)):
            attempt._relay([event])
            assert attempt.lease.counts == counts
            with services.database.write() as session:
                session.get_one(Job, job_id).lease_expires_at = now(session) + JOBS.lease_seconds - 10.0
            with services.database.write() as session:  # ten seconds after the last heartbeat
                assert attempt.lease.heartbeat(session)
            assert get(services, job_id).ran_seconds == pytest.approx(30.0 if not counts else 40.0, abs=2.0)
        assert time.monotonic() - attempt.began < 5.0


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_timeout_says_whether_there_are_checkpoints(services: Services, has_checkpoint: bool) -> None:
    job_id = make_job(services, timeout_seconds=60, ran_seconds=61.0)
    job = claim(services)
    assert job is not None
    if has_checkpoint:
        with services.database.write() as session:
            session.add(
                Checkpoint(
                    id="c", job_id=job_id, created_at=0.0, stage="dpo", step_number=5, model_name="ft:x:ckpt-step-5",
                    metrics={}, prefix="p",
                )
            )  # fmt: skip
    attempt = training(services, job)
    with JobLease(services.database, job_id, job.attempt) as attempt.lease:
        attempt.stop_early()
    error = get(services, job_id).error
    assert error is not None and error["code"] == "timeout_exceeded"
    assert ("from the last: ft:x:ckpt-step-5" in error["message"]) == has_checkpoint
    assert ("has made no checkpoint" in error["message"]) != has_checkpoint


@pytest.mark.parametrize("status", [Status.VALIDATING, Status.QUEUED])
def test_a_worker_leaves_jobs_of_a_later_version_to_others(
    client: TestClient, services: Services, status: Status
) -> None:
    """It would ignore settings that it does not know."""
    later = make_job(services, name="later", status=status, spec_version=SPEC_VERSION + 1, priority=1)
    known = make_job(services, name="known", status=status)
    with services.database.write() as session:
        claimed = [job_queue.claim(session, status, "test") for _ in range(2)]
    assert [job and job.id for job in claimed] == [known, None]
    assert (get(services, later).status, get(services, later).attempt) == (status, 0), "it did not fail"
    if status == Status.QUEUED:
        with services.database.write() as session:
            workers.report(session, "gpu@1", "gpu", ["tiny"], {"spec_version": SPEC_VERSION})
        waits_for = client.get(f"/v1/fine_tuning/jobs/{later}").json()["waiting_for"]
        assert waits_for == "a GPU worker of a later version of this service"
