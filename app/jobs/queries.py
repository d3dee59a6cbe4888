"""Queries that read jobs. A query for a caller starts from `readable`, so it sees only the caller's project."""

from collections.abc import Sequence

from sqlalchemy import Select, false, func, or_, select
from sqlalchemy.orm import Session, aliased

from app.database import mentions
from app.jobs import labels
from app.jobs.kinds import KINDS, TRAINING_JOB, JobKind
from app.jobs.states import ACTIVE, Status
from app.jobs.tables import Job, JobInput
from app.pagination import keyset

PARENT = aliased(Job)
"""The training that asked for an evaluation. An alias takes a millisecond to make, hence one for all queries."""


def readable(project: str, kind: JobKind = TRAINING_JOB) -> Select[Job]:
    """The jobs of a kind that `project` may see."""
    return select(Job).where(Job.project == project, Job.kind == kind.name)


def get(session: Session, project: str, job_id: str, kind: JobKind = TRAINING_JOB) -> Job | None:
    return session.scalar(readable(project, kind).where(Job.id == job_id))


def page(
    session: Session,
    project: str,
    *,
    after: Job | None,
    limit: int,
    metadata: dict[str, str] | None,
    kind: JobKind = TRAINING_JOB,
) -> list[Job]:
    """Up to `limit` + 1 jobs, newest first: those older than `after` whose metadata has all pairs of `metadata`.

    None asks for the jobs without metadata.
    """
    if metadata == {}:
        return list(session.scalars(keyset(readable(project, kind), (Job.created_at, Job.id), after, limit)))
    return labels.page(session, project, kind.name, metadata, after, limit)


def running(session: Session) -> Sequence[Job]:
    """All running jobs, evaluations included."""
    return session.scalars(select(Job).where(Job.status == Status.RUNNING)).all()


def paces(session: Session, base_model: str, limit: int, *, writes: bool) -> Sequence[Job]:
    """The last `limit` jobs that succeeded on `base_model` and measured their pace.

    `writes`: those whose model wrote the answers that it learned from. Else the others.
    """
    wrote = func.coalesce(Job.pace["writes"].as_boolean(), false())
    succeeded = (Job.status == Status.SUCCEEDED, Job.base_model == base_model, Job.pace.is_not(None))
    statement = select(Job).where(*succeeded, wrote == writes)
    return session.scalars(statement.order_by(Job.finished_at.desc()).limit(limit)).all()


def files_of(job: Job) -> list[str]:
    """Ids of the files that a job reads."""
    return KINDS[job.kind].files(job.spec)


def inputs_of(job: Job) -> set[str]:
    """The ids of the files and the names of the models that a job needs."""
    kind = KINDS[job.kind]
    names = {job.model, job.foundation, *kind.files(job.spec), *kind.models(job.spec)}
    return {name for name in names if name}


def users_of(session: Session, name: str, limit: int = 1) -> list[str]:
    """The ids of at most `limit` unfinished jobs that need the file or model `name`."""
    # A worker of an earlier version leaves the rows of a job that it ends.
    active = select(Job.id).where(Job.id == JobInput.job_id, Job.status.in_(ACTIVE)).exists()
    users = list(session.scalars(select(JobInput.job_id).where(JobInput.name == name, active).limit(limit)))
    # Jobs of an earlier version are few, and end.
    named = or_(Job.model == name, Job.foundation == name, mentions(Job.spec, name))
    unlisted = select(Job).where(Job.inputs_listed == false(), Job.status.in_(ACTIVE), named)
    return (users + [job.id for job in session.scalars(unlisted) if name in inputs_of(job)])[:limit]


def orphans(session: Session) -> Sequence[Job]:
    """Unfinished evaluations whose training failed or was cancelled: their model will never exist."""
    ended = PARENT.status.in_((Status.FAILED, Status.CANCELLED))
    # An expression in place of the column: SQLite would go through the whole queue, of which few jobs have a parent.
    unfinished = func.coalesce(Job.status, "").in_(ACTIVE)
    children = select(Job).join(PARENT, PARENT.id == Job.parent_id).where(Job.parent_id > "", unfinished, ended)
    return session.scalars(children).all()
