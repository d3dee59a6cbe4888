"""All SQL about tasks: what is to be made, and the leases of those who make it."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, delete, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.database import database_now, new_id
from app.derived_artifacts.tables import Task
from app.jobs.repository import LEASE_SECONDS, MAX_LOST_ATTEMPTS, RETRY_SECONDS, eligible, lapsed, serves

_LEASED = (Task.status == "pending", Task.lease_owner.is_not(None))
REPORT, MERGE = "report", "merge"
TRANSIENT, AGAIN_SECONDS = ("worker_lost", "model_unavailable"), 300.0
"""Failures that say nothing of the task, and after how long it is tried again when it is asked for."""


def find(session: Session, kind: str, subject: str) -> Task | None:
    return session.scalar(select(Task).where(Task.kind == kind, Task.subject == subject))


def pending(session: Session, project: str, seconds: float) -> int:
    """How many reports in tokens a project has asked for in the last `seconds` that are not done."""
    counted = (Task.kind == REPORT, Task.base_model.is_not(None), Task.created_at > database_now() - seconds)
    waiting = select(func.count()).select_from(Task).where(Task.project == project, Task.status == "pending", *counted)
    return session.scalars(waiting).one()


def ensure(
    session: Session,
    kind: str,
    subject: str,
    *,
    project: str,
    owner: str,
    arguments: dict[str, Any],
    base_model: str | None = None,
) -> Task:
    """The task, made where it is not there. One that failed by no fault of its subject is tried again after a while."""
    task = find(session, kind, subject)
    if task is not None and task.status == "failed" and (task.error or {}).get("code") in TRANSIENT:
        old = delete(Task).where(Task.id == task.id, Task.finished_at < database_now() - AGAIN_SECONDS)
        if session.scalar(old.returning(Task.id)) is not None:
            session.expunge(task)
            task = None
    if task is None:
        task = Task(
            id=new_id("task"),
            kind=kind,
            subject=subject,
            owner=owner,
            project=project,
            base_model=base_model,
            arguments=arguments,
            created_at=database_now(),
            status="pending",
            attempt=0,
            eligible_at=0.0,
            lost_attempts=0,
        )
        try:
            with session.begin_nested():
                session.add(task)
                session.flush()
        except IntegrityError:  # another asked for the same at the same moment
            found = find(session, kind, subject)
            assert found is not None
            return found
    return task


def claim(session: Session, owner: str, served: Sequence[str]) -> Task | None:
    """Take the lease of the oldest task that can be done where `served` base models are, in one statement."""
    free = (Task.status == "pending", Task.lease_owner.is_(None), eligible(Task.eligible_at))
    able = or_(Task.base_model.is_(None), *(serves(Task.base_model, name) for name in served))
    best = select(Task.id).where(*free, able)
    best = best.order_by(Task.created_at, Task.id).limit(1)
    statement = (
        update(Task)
        .where(Task.id == best.with_for_update(skip_locked=True).scalar_subquery(), *free)
        .values(attempt=Task.attempt + 1, lease_owner=owner, lease_expires_at=database_now() + LEASE_SECONDS)
        .returning(Task)
        .execution_options(populate_existing=True)
    )
    return session.scalar(statement)


def heartbeat(session: Session, task_id: str, attempt: int) -> bool:
    """Extend the lease; False where another has it, or the task is gone."""
    statement = _held(task_id, attempt).values(lease_expires_at=database_now() + LEASE_SECONDS)
    return session.scalar(statement.returning(Task.id)) is not None


def finish(
    session: Session,
    task_id: str,
    attempt: int,
    *,
    result: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> bool:
    """End a task whose lease this attempt holds; False where it does not. One that it has ended already stays so."""
    values = {
        "status": "done" if error is None else "failed",
        "result": result,
        "error": error,
        "finished_at": database_now(),
        "lease_owner": None,
        "lease_expires_at": None,
    }
    if session.scalar(_held(task_id, attempt).values(**values).returning(Task.id)) is not None:
        return True
    # The commit may have been done and only its answer lost: nobody but this attempt ends the task under its number.
    ended = select(Task.id).where(Task.id == task_id, Task.attempt == attempt, Task.status == values["status"])
    return session.scalar(ended) is not None


def hand_back(session: Session, task: Task, reason: str) -> None:
    """Let another attempt do a task whose worker was lost; fail it when that keeps happening."""
    lost = task.lost_attempts + 1
    if lost >= MAX_LOST_ATTEMPTS:
        finish(session, task.id, task.attempt, error={"code": "worker_lost", "message": reason})
        return
    session.execute(
        _held(task.id, task.attempt).values(
            lease_owner=None,
            lease_expires_at=None,
            lost_attempts=lost,
            eligible_at=database_now() + RETRY_SECONDS ** (lost - 1),
        )
    )


def leases(session: Session) -> Sequence[Row[str, int, float | None]]:
    """(id, attempt, end) of every lease of a task that someone holds."""
    return session.execute(select(Task.id, Task.attempt, Task.lease_expires_at).where(*_LEASED)).all()


def expired(session: Session) -> Sequence[Task]:
    """Tasks whose worker stopped renewing its lease."""
    statement = select(Task).where(*_LEASED, lapsed(Task.lease_expires_at))
    return session.scalars(statement.with_for_update(skip_locked=True)).all()


def of_owner(session: Session, owner: str) -> Sequence[Task]:
    """The tasks that go with a file or a model."""
    return session.scalars(select(Task).where(Task.owner == owner)).all()


def finished_before(session: Session, kind: str, seconds: float) -> Sequence[Task]:
    """The tasks of a kind that ended more than `seconds` ago."""
    return session.scalars(select(Task).where(Task.kind == kind, Task.finished_at < database_now() - seconds)).all()


def forget(session: Session, owner: str) -> None:
    """Remove the tasks that go with a file or a model that is gone."""
    session.execute(delete(Task).where(Task.owner == owner))


def _held(task_id: str, attempt: int) -> Any:
    return update(Task).where(Task.id == task_id, Task.attempt == attempt, Task.lease_owner.is_not(None))
