"""The queue of jobs: which one is next, who may start it, and who holds its lease."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, ScalarSelect, case, func, not_, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from app.database import database_now, wait_for_others
from app.jobs import events as job_events
from app.jobs.kinds import KINDS
from app.jobs.states import ACTIVE, Status
from app.jobs.tables import Job, OtherBase
from app.projects.tables import Project
from app.work_queue import OUTAGE_SECONDS, WorkQueue
from app.workers.repository import served_by

QUEUE_ORDER = (Job.priority.desc(), Job.created_at, Job.id)
JOBS = WorkQueue(Job, noun="job", active=Job.status.in_([Status.VALIDATING, Status.RUNNING]), order=QUEUE_ORDER)
CLAIM_LOCK = 0x64706F
"""Key of the advisory lock that claims take: an arbitrary number that nothing else uses."""


def _ready() -> ColumnElement[bool]:
    """The condition that a job waits for no other. An evaluation waits until its training, if any, has succeeded."""
    parent = aliased(Job)
    status = select(parent.status).where(parent.id == Job.parent_id).correlate(Job).scalar_subquery()
    return or_(Job.parent_id.is_(None), status == Status.SUCCEEDED)


WAITING = (Job.status == Status.QUEUED, Job.paused.is_(False), _ready())


@dataclass(frozen=True)
class WaitingJob:
    """A job in the queue, and what a worker needs for it."""

    id: str
    project: str
    bases: list[str]
    """The base models that the worker must serve."""
    memory_bytes: int | None
    """The memory that its device must have; None if that is not known."""
    seconds: float | None
    """Expected seconds of training; None if that is not known."""


def waiting(session: Session, limit: int) -> list[WaitingJob]:
    """The first `limit` waiting jobs, next one first."""
    statement = select(Job.id, Job.project, Job.base_model, Job.memory_bytes, Job.estimated_seconds).where(*WAITING)
    rows = session.execute(statement.order_by(*QUEUE_ORDER).limit(limit)).all()
    jobs = {
        job_id: WaitingJob(job_id, project, [base] if base else [], memory, seconds)
        for job_id, project, base, memory, seconds in rows
    }
    others = select(OtherBase.job_id, OtherBase.base_model).where(OtherBase.job_id.in_(jobs))
    for job_id, base in session.execute(others):
        jobs[job_id].bases.append(base)
    return list(jobs.values())


def projects_at_limit(session: Session, projects: Collection[str]) -> dict[str, int]:
    """The largest number of running jobs of each of `projects` that has reached it."""
    statement = select(Project.id, Project.max_running_jobs).where(
        Project.id.in_(projects), _running_jobs(Project.id) >= Project.max_running_jobs
    )
    return {project: limit for project, limit in session.execute(statement) if limit is not None}


def positions(session: Session, job_ids: Sequence[str]) -> dict[str, int]:
    """The position in the queue of each waiting job of `job_ids`. Position 1 starts next."""
    position = func.row_number().over(order_by=QUEUE_ORDER).label("position")
    places = select(Job.id, position).where(*WAITING).subquery()
    rows = session.execute(select(places.c.id, places.c.position).where(places.c.id.in_(job_ids)))
    return dict(rows.all())


def set_paused(session: Session, job_id: str, paused: bool) -> bool:
    """Pause a job or resume it; False if it has ended."""
    statement = update(Job).where(Job.id == job_id, Job.status.in_(ACTIVE)).values(paused=paused).returning(Job.id)
    return session.scalar(statement) is not None


def claim(
    session: Session,
    status: Status,
    owner: str,
    served: Sequence[str] | None = None,
    memory_bytes: int | None = None,
) -> Job | None:
    """Take the lease of the best eligible job with `status`; None if there is none.

    The highest priority comes first, then the oldest job. A queued job becomes running. `served` limits the claim of
    a queued job to base models that match these patterns (`*` matches anything), and `memory_bytes` to jobs that need
    no more memory. None allows any.
    """
    if status != Status.QUEUED:
        return JOBS.claim(session, owner, Job.status == status)
    wait_for_others(session, CLAIM_LOCK)  # without it, two claims at once could exceed a project's limit
    conditions = [*WAITING, _within_limit()]
    if served is not None:
        unserved = select(OtherBase.job_id).where(
            OtherBase.job_id == Job.id, not_(served_by(OtherBase.base_model, served))
        )
        conditions += [or_(Job.base_model == "", served_by(Job.base_model, served)), ~unserved.correlate(Job).exists()]
    if memory_bytes is not None:
        conditions.append(or_(Job.memory_bytes.is_(None), Job.memory_bytes <= memory_bytes))
    started = func.coalesce(Job.started_at, database_now())
    job = JOBS.claim(session, owner, *conditions, status=Status.RUNNING, started_at=started)
    if job is not None:
        job_events.add(session, job.id, KINDS[job.kind].started)
    return job


def _within_limit() -> ColumnElement[bool]:
    """The condition that the job's project may run one more job."""
    limit = select(Project.max_running_jobs).where(Project.id == Job.project).correlate(Job).scalar_subquery()
    return or_(limit.is_(None), _running_jobs(Job.project) < limit)


def _running_jobs(project: InstrumentedAttribute[str]) -> ScalarSelect[int]:
    """The number of running jobs of the project that a column names, in each row of the column's table."""
    other = aliased(Job)
    count = select(func.count()).where(other.project == project, other.status == Status.RUNNING)
    return count.correlate(project.class_).scalar_subquery()


@dataclass(frozen=True)
class LeaseState:
    """The state of a job after a heartbeat has renewed its lease."""

    paused: bool
    ran_seconds: float


def heartbeat(session: Session, job_id: str, attempt: int) -> LeaseState | None:
    """Extend the lease; None if this attempt no longer holds it.

    The `ran_seconds` of a running job grow by the time since the last heartbeat.
    """
    passed = database_now() - (Job.lease_expires_at - JOBS.lease_seconds)
    # Two heartbeats are at most this far apart. A longer or negative time means that the clock was changed.
    plausible = case((passed.between(0.0, JOBS.lease_seconds + OUTAGE_SECONDS), passed), else_=0.0)
    ran_seconds = Job.ran_seconds + case((Job.status == Status.RUNNING, plausible), else_=0.0)
    row = JOBS.heartbeat(session, job_id, attempt, Job.paused, Job.ran_seconds, ran_seconds=ran_seconds)
    return None if row is None else LeaseState(*row)
