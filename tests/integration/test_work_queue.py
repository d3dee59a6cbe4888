"""The work queue's kernel with each of its queues, on SQLite and PostgreSQL."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from app.database import database_now
from app.derived_artifacts import repository as artifacts
from app.derived_artifacts.repository import ARTIFACTS
from app.jobs.queue import JOBS
from app.jobs.states import Status
from app.services import Services
from app.webhooks.repository import DELIVERIES
from app.webhooks.tables import WebhookDelivery, WebhookEndpoint
from app.work_queue import HEARTBEAT_SECONDS, WorkQueue
from tests.helpers.jobs import make_job
from worker.reaper import QUEUES, reap


def add_job(services: Services) -> None:
    make_job(services, status=Status.VALIDATING)


def add_artifact(services: Services) -> None:
    with services.database.write() as session:
        artifacts.ensure(session, artifacts.REPORT, "a file", project="default", owner="a file", arguments={})


def add_delivery(services: Services) -> None:
    now = database_now()
    with services.database.write() as session:
        session.add(
            WebhookEndpoint(id="whe", project="default", url="https://x", events=[], sealed_secret="", created_at=now)
        )
        session.flush()
        session.add(
            WebhookDelivery(
                id="whd",
                endpoint_id="whe",
                event_id="evt",
                type="x",
                body={},
                created_at=now,
                attempt=0,
                eligible_at=now,
                lost_attempts=0,
                log=[],
            )
        )


Add = Callable[[Services], None]
Queue = WorkQueue[Any]
ALL = [pytest.param(JOBS, add_job, id="jobs"), pytest.param(ARTIFACTS, add_artifact, id="artifacts"),
       pytest.param(DELIVERIES, add_delivery, id="deliveries")]  # fmt: skip


def change(services: Services, queue: Queue, **columns: object) -> None:
    with services.database.write() as session:
        session.execute(update(queue.table).values(**columns))


def claim(services: Services, queue: Queue) -> Any:
    with services.database.write() as session:
        return queue.claim(session, "test", queue.active)


def test_every_queue_is_covered_here() -> None:
    assert {queue for queue, _ in QUEUES} == {JOBS, ARTIFACTS, DELIVERIES}


@pytest.mark.parametrize(("queue", "add"), ALL)
def test_only_one_of_many_workers_claims_a_row(services: Services, queue: Queue, add: Add) -> None:
    add(services)
    claimed, start = list[Any](), threading.Barrier(6)

    def work() -> None:
        start.wait()
        claimed.append(claim(services, queue))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (row,) = [row for row in claimed if row is not None]
    assert row.attempt == 1 and row.lease_owner == "test"


@pytest.mark.parametrize(("queue", "add"), ALL)
def test_a_lapsed_lease_is_released_and_its_attempt_writes_nothing(services: Services, queue: Queue, add: Add) -> None:
    add(services)
    first = claim(services, queue)
    assert claim(services, queue) is None, "the row is leased"
    reap(services.database)
    with services.database.write() as session:
        assert queue.heartbeat(session, first.id, first.attempt) is not None, "a valid lease stays"
    change(services, queue, lease_expires_at=database_now() - 1)
    reap(services.database)
    change(services, queue, eligible_at=database_now())
    second = claim(services, queue)
    assert (second.attempt, second.lost_attempts) == (2, 1)

    def guarded(session: Session, attempt: int) -> list[bool]:
        renewed = queue.heartbeat(session, first.id, attempt) is not None
        return [renewed, queue.write(session, first.id, attempt, lost_attempts=0)]

    with services.database.write() as session:
        assert guarded(session, first.attempt) == [False, False]
        assert not queue.release(session, first.id, first.attempt, pause=0.0)
        assert guarded(session, second.attempt) == [True, True]
        assert queue.release(session, first.id, second.attempt, pause=0.0)
        assert guarded(session, second.attempt) == [False, False], "the attempt has given its lease back"


@pytest.mark.parametrize(("queue", "add"), ALL)
def test_a_row_waits_for_its_time_but_not_for_a_clock_that_was_set_back(
    services: Services, queue: Queue, add: Add
) -> None:
    add(services)
    change(services, queue, eligible_at=database_now() + queue.longest_pause)
    assert claim(services, queue) is None
    change(services, queue, eligible_at=database_now() + queue.longest_pause + 2 * HEARTBEAT_SECONDS)
    assert claim(services, queue) is not None, "no pause is that long"
    change(services, queue, lease_expires_at=database_now() + queue.lease_seconds + 2 * HEARTBEAT_SECONDS)
    with services.database.write() as session:
        assert len(queue.lapsed(session)) == 1, "no lease is that long"
