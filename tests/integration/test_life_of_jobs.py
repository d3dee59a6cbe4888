"""Any sequence of requests, wake-ups, deaths and clock changes leaves every job in the state that a model predicts.

This is a hypothesis state machine. Its rules are the actions of clients, workers and reapers. The service's own code
performs them on a real database. After every step all jobs are compared with the model. The test sets the database's
clock.
"""

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi.testclient import TestClient
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import event, func, select, text, update

from app.database import Table
from app.jobs import queue as job_queue
from app.jobs import transitions
from app.jobs.queue import JOBS
from app.jobs.states import ACTIVE, Actor, Status
from app.jobs.tables import Job, JobEvent
from app.main import create_app
from app.projects.tables import Project
from app.services import Services
from app.settings import Settings
from app.work_queue import LEASE_SECONDS, MAX_LOST_ATTEMPTS, RETRY_SECONDS
from tests.helpers.api import upload
from worker.reaper import reap

STEPS = int(os.environ.get("DPO_STATE_MACHINE_STEPS", "1500"))
"""Steps on each database, in sequences of up to 50. `make faults` takes 10,000."""
EPOCH = 1_800_000_000.0


@dataclass
class ExpectedJob:
    """A job as the model expects it."""

    priority: int
    created_at: float
    status: Status = Status.VALIDATING
    paused: bool = False
    attempt: int = 0
    lost_attempts: int = 0
    eligible_at: float = 0.0
    lease_expires_at: float | None = None

    @property
    def active(self) -> bool:
        return self.status in ACTIVE


@dataclass
class World:
    """The service, its database's clock, and a client of its API."""

    services: Services
    client: TestClient
    set_clock: Callable[[float], None]
    file: str
    steps: int = 0


class JobLifecycle(RuleBasedStateMachine):
    """One sequence. `believed_leases` are (job, attempt) pairs that a worker believes it holds, valid or stale."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.now = EPOCH
        self.world.set_clock(self.now)
        self.jobs: dict[str, ExpectedJob] = {}
        self.believed_leases: list[tuple[str, int]] = []
        self.limit: int | None = None
        with self.world.services.database.write() as session:
            for table in ("job_labels", "job_inputs", "job_events", "sent_requests", "webhook_deliveries", "jobs"):
                session.execute(Table.metadata.tables[table].delete())
            session.execute(update(Project).values(max_running_jobs=None))
        self.keys = 0

    # -- clients -----------------------------------------------------------------------------------------------

    @rule(priority=st.integers(-1, 1), sendings=st.integers(1, 3))
    def create(self, priority: int, sendings: int) -> None:
        """A request that is sent again after a lost answer creates one job."""
        self.keys += 1
        self.time_passes(0.125)  # the queue is ordered by time: ids are random
        body = {"model": "tiny", "training_file": self.world.file, "priority": priority}
        answers = [
            self.world.client.post("/v1/fine_tuning/jobs", json=body, headers={"Idempotency-Key": f"{self.keys}"})
            for _ in range(sendings)
        ]
        (job_id,) = {answer.json()["id"] for answer in answers}
        self.jobs[job_id] = ExpectedJob(priority, self.now)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id, job = self._any_job(data)
        answer = self.world.client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
        assert answer.status_code == (200 if job.active else 409)
        if job.active:
            job.status, job.lease_expires_at = Status.CANCELLED, None

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), verb=st.sampled_from(["pause", "resume"]))
    def pause_or_resume(self, data: st.DataObject, verb: str) -> None:
        job_id, job = self._any_job(data)
        answer = self.world.client.post(f"/v1/fine_tuning/jobs/{job_id}/{verb}")
        assert answer.status_code == (200 if job.active else 409)
        if job.active:
            job.paused = verb == "pause"

    @rule(limit=st.sampled_from([None, 0, 1, 2]))
    def limit_the_project(self, limit: int | None) -> None:
        with self.world.services.database.write() as session:
            session.execute(update(Project).values(max_running_jobs=limit))
        self.limit = limit

    # -- workers -----------------------------------------------------------------------------------------------

    @rule(lane=st.sampled_from([Status.VALIDATING, Status.QUEUED]), wakes=st.integers(1, 3))
    def wake_up(self, lane: Status, wakes: int) -> None:
        """However often a wake-up comes, each claim takes the first job of the queue, and no job twice."""
        for _ in range(wakes):
            with self.world.services.database.write() as session:
                claimed = job_queue.claim(session, lane, "worker", ["tiny"] if lane == Status.QUEUED else None)
            expected = self._next_in_lane(lane)
            assert (claimed and claimed.id) == expected
            if expected is None:
                return
            job = self.jobs[expected]
            job.attempt, job.lease_expires_at = job.attempt + 1, self.now + LEASE_SECONDS
            job.status = Status.RUNNING if lane == Status.QUEUED else lane
            self.believed_leases.append((expected, job.attempt))

    @precondition(lambda self: self.believed_leases)
    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        job_id, attempt, valid = self._believed_lease(data)
        with self.world.services.database.write() as session:
            row = job_queue.heartbeat(session, job_id, attempt)
        assert (row is not None) == valid
        if row is not None:
            assert row.paused == self.jobs[job_id].paused
            self.jobs[job_id].lease_expires_at = self.now + LEASE_SECONDS

    @precondition(lambda self: self.believed_leases)
    @rule(data=st.data())
    def checkpoint(self, data: st.DataObject) -> None:
        job_id, attempt, valid = self._believed_lease(data)
        with self.world.services.database.write() as session:
            assert JOBS.write(session, job_id, attempt, lost_attempts=0) == valid
        if valid:
            self.jobs[job_id].lost_attempts = 0

    @precondition(lambda self: self.believed_leases)
    @rule(
        data=st.data(),
        outcome=st.sampled_from([Status.QUEUED, Status.SUCCEEDED, Status.FAILED]),
    )
    def end(self, data: st.DataObject, outcome: Status) -> None:
        """A worker ends its attempt: files checked, training succeeded or failed, or job handed back."""
        job_id, attempt, valid = self._believed_lease(data)
        job = self.jobs[job_id]
        source = job.status if valid else Status.RUNNING
        target = outcome
        if source == Status.VALIDATING and target == Status.SUCCEEDED:
            target = Status.QUEUED
        actor = Actor.VALIDATOR if source == Status.VALIDATING else Actor.RUNNER
        checked = source == Status.VALIDATING and target == Status.QUEUED
        columns: dict[str, Any] = {"lost_attempts": 0} if checked else {}
        with self.world.services.database.write() as session:
            written = transitions.transition(
                session,
                job_id,
                source,
                target,
                actor=actor,
                attempt=attempt,
                message=f"ended: {target}",
                **columns,
            )
        assert written == valid
        if valid:
            job.status, job.lease_expires_at, job.lost_attempts = target, None, 0 if checked else job.lost_attempts

    @precondition(lambda self: self.believed_leases)
    @rule(data=st.data())
    def trainer_dies(self, data: st.DataObject) -> None:
        """The worker of a trainer that died gives the job back at once."""
        job_id, attempt, valid = self._believed_lease(data)
        with self.world.services.database.write() as session:
            row = session.get_one(Job, job_id)
            if row.attempt == attempt and row.status in (Status.RUNNING, Status.VALIDATING) and row.lease_owner:
                assert valid
                actor = Actor.RUNNER if row.status == Status.RUNNING else Actor.VALIDATOR
                transitions.recover(session, row, actor, "It died.")
            else:
                assert not valid
        if valid:
            self._lose(self.jobs[job_id])

    @precondition(lambda self: self.believed_leases)
    @rule(data=st.data())
    def worker_dies(self, data: st.DataObject) -> None:
        """kill -9: the worker reports nothing."""
        del self.believed_leases[data.draw(st.integers(0, len(self.believed_leases) - 1))]

    # -- time --------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.5, 2.0, 14.0, 16.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.world.set_clock(self.now)

    @rule(seconds=st.sampled_from([-300.0, -20.0]))
    def clock_goes_back(self, seconds: float) -> None:
        """Leases now end later than any valid lease. Their holders renew them, or a reaper takes them."""
        self.time_passes(seconds)

    @rule(reapers=st.integers(1, 3))
    def reap(self, reapers: int) -> None:
        """Several reapers at once take each lease once."""
        threads = [threading.Thread(target=reap, args=(self.world.services.database,)) for _ in range(reapers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for job in self.jobs.values():
            if (
                job.lease_expires_at is not None
                and not self.now <= job.lease_expires_at <= self.now + LEASE_SECONDS + 3.0
            ):
                self._lose(job)

    # -- what is always true -----------------------------------------------------------------------------------

    @invariant()
    def rows_match_the_model(self) -> None:
        self.world.steps += 1
        with self.world.services.database.read() as session:
            rows = {row.id: row for row in session.scalars(select(Job))}
            ends = dict(
                session.execute(
                    select(JobEvent.job_id, func.count())
                    .where(JobEvent.message.in_(["ended: succeeded", "ended: failed", "The job was cancelled."]))
                    .group_by(JobEvent.job_id)
                ).all()
            )
            given_up = set(
                session.scalars(select(JobEvent.job_id).where(JobEvent.message.contains("the job was given up")))
            )
        assert rows.keys() == self.jobs.keys()
        for job_id, job in self.jobs.items():
            row = rows[job_id]
            actual = (row.status, row.attempt, row.paused, row.lost_attempts if job.active else job.lost_attempts)
            assert actual == (job.status, job.attempt, job.paused, job.lost_attempts)
            assert (row.lease_owner is not None) == (job.lease_expires_at is not None)
            assert ends.get(job_id, 0) + (job_id in given_up) == int(not job.active), "each job ends once"

    def teardown(self) -> None:
        """Left alone with one worker, every job ends."""
        self.limit_the_project(None)
        for job_id, job in self.jobs.items():
            if job.active and job.paused:
                self.world.client.post(f"/v1/fine_tuning/jobs/{job_id}/resume")
                job.paused = False
        for _ in range(4 * len(self.jobs) * MAX_LOST_ATTEMPTS):
            if not any(job.active for job in self.jobs.values()):
                break
            self.time_passes(400.0)
            self.reap(1)
            self.time_passes(RETRY_SECONDS)
            for lane, target in ((Status.VALIDATING, Status.QUEUED), (Status.QUEUED, Status.SUCCEEDED)):
                leases_before = len(self.believed_leases)
                self.wake_up(lane, 1)
                for job_id, attempt in self.believed_leases[leases_before:]:
                    actor = Actor.VALIDATOR if lane == Status.VALIDATING else Actor.RUNNER
                    with self.world.services.database.write() as session:
                        assert transitions.transition(
                            session,
                            job_id,
                            self.jobs[job_id].status,
                            target,
                            actor=actor,
                            attempt=attempt,
                            message=f"ended: {target}",
                        )
                    self.jobs[job_id].status, self.jobs[job_id].lease_expires_at = target, None
        assert not any(job.active for job in self.jobs.values())
        self.rows_match_the_model()

    # -- the model ---------------------------------------------------------------------------------------------

    def _any_job(self, data: st.DataObject) -> tuple[str, ExpectedJob]:
        names = list(self.jobs)
        job_id = names[data.draw(st.integers(0, len(names) - 1))]
        return job_id, self.jobs[job_id]

    def _believed_lease(self, data: st.DataObject) -> tuple[str, int, bool]:
        job_id, attempt = self.believed_leases[data.draw(st.integers(0, len(self.believed_leases) - 1))]
        job = self.jobs[job_id]
        return job_id, attempt, job.attempt == attempt and job.lease_expires_at is not None

    def _next_in_lane(self, lane: Status) -> str | None:
        running = sum(job.status == Status.RUNNING for job in self.jobs.values())
        checking = sum(
            job.status == Status.VALIDATING and job.lease_expires_at is not None for job in self.jobs.values()
        )
        if self.limit is not None:
            if lane == Status.QUEUED and running >= self.limit:
                return None
            if lane == Status.VALIDATING and checking >= max(1, self.limit):
                return None
        free = [
            (-job.priority, job.created_at, job_id)
            for job_id, job in self.jobs.items()
            if job.status == lane
            and job.lease_expires_at is None
            and (job.eligible_at <= self.now or job.eligible_at > self.now + RETRY_SECONDS + 3.0)
            and not (lane == Status.QUEUED and job.paused)
        ]
        return min(free)[2] if free else None

    def _lose(self, job: ExpectedJob) -> None:
        lost_attempts = job.lost_attempts + 1
        job.lease_expires_at = None
        if lost_attempts >= MAX_LOST_ATTEMPTS:
            job.status = Status.FAILED
        else:
            job.lost_attempts, job.eligible_at = lost_attempts, self.now + RETRY_SECONDS ** (lost_attempts - 1)
            job.status = Status.QUEUED if job.status == Status.RUNNING else job.status


@contextmanager
def sqlite_clock(services: Services) -> Iterator[Callable[[float], None]]:
    """Replace SQLite's `julianday('now')`, the service's clock, by the time of the test."""
    now = [EPOCH]

    def connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.create_function("julianday", 1, lambda _: now[0] / 86400.0 + 2440587.5)

    event.listen(services.database.engine, "connect", connect)
    services.database.engine.dispose()
    yield partial(now.__setitem__, 0)


@contextmanager
def postgres_clock(services: Services) -> Iterator[Callable[[float], None]]:
    """Put a function of the same name before PostgreSQL's own clock."""
    name = services.database.engine.url.database
    with services.database.write() as session:
        session.execute(text("CREATE TABLE test_clock (now double precision NOT NULL)"))
        session.execute(text(f"INSERT INTO test_clock VALUES ({EPOCH})"))
        session.execute(
            text(
                "CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS "
                "'SELECT to_timestamp(now) FROM public.test_clock'"
            )
        )
        session.execute(text(f"ALTER DATABASE {name} SET search_path = public, pg_catalog"))
    services.database.engine.dispose()

    def set_clock(now: float) -> None:
        with services.database.write() as session:
            session.execute(text("UPDATE test_clock SET now = :now"), {"now": now})

    yield set_clock


def test_every_sequence_leaves_every_job_in_the_expected_state(services: Services, settings: Settings) -> None:
    clock = sqlite_clock if services.database.engine.dialect.name == "sqlite" else postgres_clock
    with clock(services) as set_clock:
        headers = {"Authorization": f"Bearer {settings.admin_key}"}
        app = create_app(settings)
        app.state.services = services
        with TestClient(app, "http://localhost", headers=headers) as client:
            world = World(services, client, set_clock, upload(client))

            class BoundLifecycle(JobLifecycle):
                pass

            BoundLifecycle.world = world
            sequences = hypothesis_settings(
                max_examples=STEPS // 40,  # some sequences are shorter than 50 steps
                stateful_step_count=50,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            run_state_machine_as_test(BoundLifecycle, settings=sequences)
    assert world.steps >= STEPS
