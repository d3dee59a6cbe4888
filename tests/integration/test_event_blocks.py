"""Events of ended jobs go to blocks, and every reader sees the same events as before."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select, update

from app.chores import Chore
from app.database import database_now, now
from app.jobs import event_blocks
from app.jobs import events as job_events
from app.jobs.states import Status
from app.jobs.tables import EventBlock, Job, JobEvent
from app.prune import prune
from app.services import Services
from tests.helpers.jobs import make_job
from worker.housekeeping import ROLLOUT_SECONDS, forget_old_events, pack_events

EVENTS = 2 * event_blocks.BLOCK_EVENTS + 345


@pytest.fixture
def job(services: Services) -> str:
    """A job that ended yesterday, with messages and metrics of several blocks. Another job has events between them."""
    job_id, other = make_job(services, name="a", status=Status.SUCCEEDED), make_job(services, name="b")
    with services.database.write() as session:
        for number in range(EVENTS):
            is_message = number % 7 == 0
            data = None if is_message else {"step": number, "stage": "dpo", "loss": number / 7, "absent": None}
            session.add(
                JobEvent(
                    id=f"ftevent-{number:024d}", job_id=job_id, created_at=1e9 + number / 3, level="info",
                    type="message" if is_message else "metrics", message=f"Event {number} ünd mehr\ufffd", data=data,
                )
            )  # fmt: skip
            if number % 500 == 0:
                session.add(
                    JobEvent(
                        id=f"ftevent-other-{number}", job_id=other, created_at=0.0, level="warn", type="message",
                        message="other", data=None,
                    )
                )  # fmt: skip
        session.execute(update(Job).where(Job.id == job_id).values(finished_at=database_now() - 86400))
    return job_id


def pages(client: TestClient, job_id: str, limit: int) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    after = ""
    while True:
        answer = client.get(f"/v1/fine_tuning/jobs/{job_id}/events?limit={limit}{after}").json()
        events += answer["data"]
        if not answer["has_more"]:
            return events
        after = f"&after={answer['data'][-1]['id']}"


def seen(client: TestClient, services: Services, job_id: str) -> dict[str, Any]:
    """All that a reader can see of a job's events."""
    path = f"/v1/fine_tuning/jobs/{job_id}"
    with services.database.read() as session:
        known = f"ftevent-{EVENTS // 2:024d}"
        followed = job_events.after(session, job_id, 0, EVENTS + 10)
        part = job_events.after(session, job_id, followed[EVENTS // 3].sequence, 100)
        return {
            "pages": pages(client, job_id, 97),
            "metrics": client.get(f"{path}/metrics?points=5000").json(),
            "stream": client.get(f"{path}/stream", headers={"Last-Event-ID": known}).text,
            "followed": [(event.sequence, event.id, event.data) for event in followed],
            "part": [event.id for event in part],
            "number": job_events.sequence_of(session, job_id, known),
            "unknown": client.get(f"{path}/events?after=ftevent-none").json(),
        }


def numbers(services: Services, job_id: str) -> tuple[int, int]:
    """(rows, blocks) of a job's events."""
    with services.database.read() as session:
        rows, blocks = (
            session.scalars(select(func.count()).where(table.job_id == job_id)).one()
            for table in (JobEvent, EventBlock)
        )
    return rows, blocks


def pack(services: Services) -> bool:
    with services.database.write() as session:
        return event_blocks.pack(session)


def test_readers_see_the_same_events_in_blocks_as_in_rows(client: TestClient, services: Services, job: str) -> None:
    before = seen(client, services, job)
    assert len(before["pages"]) == len(before["followed"]) == EVENTS
    while pack(services):
        assert seen(client, services, job) == before
    assert numbers(services, job) == (0, 3)
    with services.database.write() as session:
        job_events.add(session, job, "All gates are met.")
    newest = client.get(f"/v1/fine_tuning/jobs/{job}/events?limit=2").json()["data"]
    assert [event["message"] for event in newest] == ["All gates are met.", before["pages"][0]["message"]]
    assert len(pages(client, job, 100)) == EVENTS + 1


@pytest.mark.parametrize("reader", ["before", "after"])
def test_events_that_move_while_they_are_read_are_seen_once(
    client: TestClient, services: Services, job: str, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    before = seen(client, services, job)
    read = getattr(event_blocks, reader)

    def read_later(*arguments: Any) -> Any:
        pack(services)
        return read(*arguments)

    monkeypatch.setattr(event_blocks, reader, read_later)
    for _ in range(2):
        assert seen(client, services, job) == before
    assert numbers(services, job) == (0, 3)


def pack_all(services: Services) -> None:
    """Pack as a worker does it every minute, a day after the upgrade."""
    pack_events(services)
    with services.database.write() as session:
        session.execute(update(Chore).values(cursor=str(now(session) - 1.1 * ROLLOUT_SECONDS), due_at=0.0))
    pack_events(services)


def test_packing_begins_a_day_after_the_upgrade(services: Services, job: str) -> None:
    """An API of the version before reads rows only."""
    for hours in (0, 23):
        with services.database.write() as session:
            moved = {"cursor": Chore.cursor if hours == 0 else str(now(session) - hours * 3600), "due_at": 0.0}
            session.execute(update(Chore).values(moved))
        pack_events(services)
        assert numbers(services, job) == (EVENTS, 0)
    pack_all(services)
    assert numbers(services, job) == (0, 3)


def test_only_events_of_jobs_that_ended_a_while_ago_are_packed(services: Services, job: str) -> None:
    running, just_ended = make_job(services, name="r"), make_job(services, name="e", status=Status.FAILED)
    with services.database.write() as session:
        for job_id in (running, just_ended):
            job_events.add(session, job_id, "told")
    pack_all(services)
    assert numbers(services, job) == (0, 3)
    assert numbers(services, running) == numbers(services, just_ended) == (1, 0)


def test_a_block_takes_a_fifth_of_its_rows(services: Services) -> None:
    """As a training writes them: a dozen metrics of 17 digits in each step."""
    names = [f"rewards/metric-{number}" for number in range(12)]
    events = [
        JobEvent(
            sequence=step, id=f"ftevent-{step:024d}", job_id="ftjob-1", created_at=1e9 + step / 7, level="info",
            type="metrics", message=f"Step {step}/5900: loss={step / 7:.4f}",
            data={"step": step, "stage": "dpo"} | {name: hash((name, step)) / 2**61 for name in names},
        )
        for step in range(1, event_blocks.BLOCK_EVENTS + 1)
    ]  # fmt: skip
    block = event_blocks._block("ftjob-1", events)
    rows = sum(len(event.message) + len(str(event.data)) + 3 * len(event.id) + 100 for event in events)
    assert len(block.ids) + len(block.content) < rows / 3.5
    assert [event.data for event in event_blocks.events_of(block)] == [event.data for event in events]


def test_blocks_are_forgotten_with_their_job_and_keep_its_log(services: Services, job: str) -> None:
    pack_all(services)
    log = f"jobs/{job}/attempt-1/trainer.log"
    services.storage.put_bytes(log, b"log")
    prune(services, delete=True, min_age=0.0)
    assert services.storage.list(f"jobs/{job}")
    assert forget_old_events(services.database, 3600) == 0, "no rows are left"
    assert numbers(services, job) == (0, 0)
    prune(services, delete=True, min_age=0.0)
    assert not services.storage.list(f"jobs/{job}")
