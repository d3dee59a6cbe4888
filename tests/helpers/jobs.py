"""Jobs as rows, without HTTP."""

import threading
from typing import Any

from sqlalchemy import update

from app.database import database_now
from app.jobs import queue as job_queue
from app.jobs import transitions
from app.jobs.states import ACTIVE, Actor, Status
from app.jobs.tables import Job
from app.services import Services
from app.spec.job import JobSpec
from tests.helpers.reader import READER
from worker.base_models import BaseModels
from worker.reader.client import Reader
from worker.validator import validate


def make_job(services: Services, **changes: Any) -> str:
    """A queued job, as if its files had been checked."""
    spec = JobSpec(model="tiny", training_file="file-1").resolved().model_dump(mode="json")
    values: dict[str, Any] = {
        "id": f"ftjob-{threading.get_ident()}-{changes.pop('name', 'a')}",
        "project": "default",
        "model": "tiny",
        "base_model": "tiny",
        "training_file": "file-1",
        "spec": spec,
        "priority": 0,
        "status": Status.QUEUED,
        "paused": False,
        "ran_seconds": 0.0,
        "result_files": [],
        "attempt": 0,
        "eligible_at": 0.0,
        "lost_attempts": 0,
    }
    values |= changes
    if values["status"] not in ACTIVE:
        values.setdefault("finished_at", database_now())
    with services.database.write() as session:
        session.add(Job(created_at=database_now(), **values))
    job_id: str = values["id"]
    return job_id


def claim(services: Services, served: list[str] | None = None) -> Job | None:
    with services.database.write() as session:
        return job_queue.claim(session, Status.QUEUED, "test", served)


def check_files(services: Services, reader: Reader = READER) -> str:
    """Check the files of the job whose check is next, as the CPU lane does. Returns its id."""
    with services.database.write() as session:
        job = job_queue.claim(session, Status.VALIDATING, "test")
    assert job is not None
    validate(services, BaseModels(services.settings), reader, job, threading.Event())
    return job.id


def get(services: Services, job_id: str) -> Job:
    with services.database.read() as session:
        return session.get_one(Job, job_id)


def end(services: Services, job_id: str, attempt: int) -> bool:
    with services.database.write() as session:
        return transitions.transition(
            session, job_id, Status.RUNNING, Status.SUCCEEDED, actor=Actor.RUNNER, attempt=attempt, message="done"
        )


def expire(services: Services, job_id: str) -> None:
    with services.database.write() as session:
        session.execute(
            update(Job).where(Job.id == job_id).values(lease_expires_at=database_now() - 1, eligible_at=0.0)
        )
