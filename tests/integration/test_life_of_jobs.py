"""Any sequence of requests, wake-ups, deaths and clock moves leaves every job where a simple model says it is.

A hypothesis state machine: its rules are what clients, workers and reapers do, the service's own code does it to a
real database, and after every step all jobs are compared with the model. The database's clock is the test's.
"""

import os
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
"""On each database, in sequences of up to 50; `make faults` takes 10,000."""
EPOCH = 1_800_000_000.0


@dataclass
class Known:
    """What the model knows of a job."""

    priority: int
    created_at: float
    status: Status = Status.VALIDATING
    paused: bool = False
    attempt: int = 0
    lost: int = 0
    eligible_at: float = 0.0
    lease: float | None = None

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


class Life(RuleBasedStateMachine):
    """One sequence. `held` are leases that a worker believes it has: (job, attempt), good or stale."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.now = EPOCH
        self.world.set_clock(self.now)
        self.jobs: dict[str, Known] = {}
        self.held: list[tuple[str, int]] = []
        self.limit: int | None = None
        with self.world.services.database.write() as session:
            for table in ("job_events", "sent_requests", "webhook_deliveries", "jobs"):
                session.execute(Table.metadata.tables[table].delete())
            session.execute(update(Project).values(max_running_jobs=None))
        self.keys = 0

    # -- clients -----------------------------------------------------------------------------------------------

    @rule(priority=st.integers(-1, 1), sendings=st.integers(1, 3))
    def create(self, priority: int, sendings: int) -> None:
        """A request that is sent again, because its answer was lost, makes one job."""
        self.keys += 1
        self.time_passes(0.125)  # by which the queue is ordered, and not by ids, which are random
        body = {"model": "tiny", "training_file": self.world.file, "priority": priority}
        answers = [
            self.world.client.post("/v1/fine_tuning/jobs", json=body, headers={"Idempotency-Key": f"{self.keys}"})
            for _ in range(sendings)
        ]
        (made,) = {answer.json()["id"] for answer in answers}
        self.jobs[made] = Known(priority, self.now)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id, job = self._any(data)
        answer = self.world.client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
        assert answer.status_code == (200 if job.active else 409)
        if job.active:
            job.status, job.lease = Status.CANCELLED, None

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), verb=st.sampled_from(["pause", "resume"]))
    def pause_or_resume(self, data: st.DataObject, verb: str) -> None:
        job_id, job = self._any(data)
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
        """However often a wake-up comes, each look takes the best job that there is, and no job twice."""
        for _ in range(wakes):
            with self.world.services.database.write() as session:
                claimed = job_queue.claim(session, lane, "worker", ["tiny"] if lane == Status.QUEUED else None)
            best = self._best(lane)
            assert (claimed and claimed.id) == best
            if best is None:
                return
            job = self.jobs[best]
            job.attempt, job.lease = job.attempt + 1, self.now + LEASE_SECONDS
            job.status = Status.RUNNING if lane == Status.QUEUED else lane
            self.held.append((best, job.attempt))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        job_id, attempt, good = self._holder(data)
        with self.world.services.database.write() as session:
            found = job_queue.heartbeat(session, job_id, attempt)
        assert (found is not None) == good
        if found is not None:
            assert found.paused == self.jobs[job_id].paused
            self.jobs[job_id].lease = self.now + LEASE_SECONDS

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def checkpoint(self, data: st.DataObject) -> None:
        job_id, attempt, good = self._holder(data)
        with self.world.services.database.write() as session:
            assert JOBS.write(session, job_id, attempt, lost_attempts=0) == good
        if good:
            self.jobs[job_id].lost = 0

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        outcome=st.sampled_from([Status.QUEUED, Status.SUCCEEDED, Status.FAILED]),
    )
    def end(self, data: st.DataObject, outcome: Status) -> None:
        """A worker ends its attempt: files checked, training done or failed, or handed back at its own end."""
        job_id, attempt, good = self._holder(data)
        job = self.jobs[job_id]
        source = job.status if good else Status.RUNNING
        target = outcome
        if source == Status.VALIDATING and target == Status.SUCCEEDED:
            target = Status.QUEUED
        actor = Actor.VALIDATOR if source == Status.VALIDATING else Actor.RUNNER
        checked = source == Status.VALIDATING and target == Status.QUEUED
        more: dict[str, Any] = {"lost_attempts": 0} if checked else {}
        with self.world.services.database.write() as session:
            taken = transitions.transition(
                session,
                job_id,
                source,
                target,
                actor=actor,
                attempt=attempt,
                message=f"ended: {target}",
                **more,
            )
        assert taken == good
        if good:
            job.status, job.lease, job.lost = target, None, 0 if checked else job.lost

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def trainer_dies(self, data: st.DataObject) -> None:
        """The worker of a trainer that died gives the job back at once."""
        job_id, attempt, good = self._holder(data)
        with self.world.services.database.write() as session:
            row = session.get_one(Job, job_id)
            if row.attempt == attempt and row.status in (Status.RUNNING, Status.VALIDATING) and row.lease_owner:
                assert good
                actor = Actor.RUNNER if row.status == Status.RUNNING else Actor.VALIDATOR
                transitions.recover(session, row, actor, "It died.")
            else:
                assert not good
        if good:
            self._lose(self.jobs[job_id])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def worker_dies(self, data: st.DataObject) -> None:
        """kill -9: nobody hears of it."""
        del self.held[data.draw(st.integers(0, len(self.held) - 1))]

    # -- time --------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.5, 2.0, 14.0, 16.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.world.set_clock(self.now)

    @rule(seconds=st.sampled_from([-300.0, -20.0]))
    def clock_goes_back(self, seconds: float) -> None:
        """Leases end later than any could then: their holders renew them, or they are taken."""
        self.time_passes(seconds)

    @rule(reapers=st.integers(1, 3))
    def reap(self, reapers: int) -> None:
        """Several that look at once take each lease once."""
        threads = [threading.Thread(target=reap, args=(self.world.services.database,)) for _ in range(reapers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for job in self.jobs.values():
            if job.lease is not None and not self.now <= job.lease <= self.now + LEASE_SECONDS + 3.0:
                self._lose(job)

    # -- what is always true -----------------------------------------------------------------------------------

    @invariant()
    def rows_are_as_the_model_says(self) -> None:
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
            seen = (row.status, row.attempt, row.paused, row.lost_attempts if job.active else job.lost)
            assert seen == (job.status, job.attempt, job.paused, job.lost)
            assert (row.lease_owner is not None) == (job.lease is not None)
            assert ends.get(job_id, 0) + (job_id in given_up) == int(not job.active), "it ends once"

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
                before = len(self.held)
                self.wake_up(lane, 1)
                for job_id, attempt in self.held[before:]:
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
                    self.jobs[job_id].status, self.jobs[job_id].lease = target, None
        assert not any(job.active for job in self.jobs.values())
        self.rows_are_as_the_model_says()

    # -- the model ---------------------------------------------------------------------------------------------

    def _any(self, data: st.DataObject) -> tuple[str, Known]:
        names = list(self.jobs)
        job_id = names[data.draw(st.integers(0, len(names) - 1))]
        return job_id, self.jobs[job_id]

    def _holder(self, data: st.DataObject) -> tuple[str, int, bool]:
        job_id, attempt = self.held[data.draw(st.integers(0, len(self.held) - 1))]
        job = self.jobs[job_id]
        return job_id, attempt, job.attempt == attempt and job.lease is not None

    def _best(self, lane: Status) -> str | None:
        running = sum(job.status == Status.RUNNING for job in self.jobs.values())
        if lane == Status.QUEUED and self.limit is not None and running >= self.limit:
            return None
        free = [
            (-job.priority, job.created_at, job_id)
            for job_id, job in self.jobs.items()
            if job.status == lane
            and job.lease is None
            and (job.eligible_at <= self.now or job.eligible_at > self.now + RETRY_SECONDS + 3.0)
            and not (lane == Status.QUEUED and job.paused)
        ]
        return min(free)[2] if free else None

    def _lose(self, job: Known) -> None:
        lost = job.lost + 1
        job.lease = None
        if lost >= MAX_LOST_ATTEMPTS:
            job.status = Status.FAILED
        else:
            job.lost, job.eligible_at = lost, self.now + RETRY_SECONDS ** (lost - 1)
            job.status = Status.QUEUED if job.status == Status.RUNNING else job.status


@contextmanager
def sqlite_clock(services: Services) -> Iterator[Callable[[float], None]]:
    """`julianday('now')`, which is what the service asks SQLite for, answers what the test says."""
    now = [EPOCH]

    def connect(connection: Any, _record: object) -> None:
        connection.create_function("julianday", 1, lambda _: now[0] / 86400.0 + 2440587.5)

    event.listen(services.database.engine, "connect", connect)
    services.database.engine.dispose()
    yield partial(now.__setitem__, 0)


@contextmanager
def postgres_clock(services: Services) -> Iterator[Callable[[float], None]]:
    """A function of the same name is found before PostgreSQL's own clock."""
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


def test_every_sequence_leaves_every_job_where_the_model_says(services: Services, settings: Settings) -> None:
    clock = sqlite_clock if services.database.engine.dialect.name == "sqlite" else postgres_clock
    with clock(services) as set_clock:
        headers = {"Authorization": f"Bearer {settings.admin_key}"}
        app = create_app(settings)
        app.state.services = services
        with TestClient(app, "http://localhost", headers=headers) as client:
            world = World(services, client, set_clock, upload(client))

            class Here(Life):
                pass

            Here.world = world
            sequences = hypothesis_settings(
                max_examples=STEPS // 40,  # some are shorter
                stateful_step_count=50,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            run_state_machine_as_test(Here, settings=sequences)
    assert world.steps >= STEPS
