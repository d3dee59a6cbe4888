"""All SQL about sweeps. A query for a caller starts from `readable`, so it sees only the caller's project."""

from collections.abc import Sequence

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from app.jobs.tables import Job
from app.pagination import keyset
from app.sweeps.tables import Sweep


def readable(project: str) -> Select[Sweep]:
    return select(Sweep).where(Sweep.project == project)


def get(session: Session, project: str, sweep_id: str) -> Sweep | None:
    return session.scalar(readable(project).where(Sweep.id == sweep_id))


def page(session: Session, project: str, *, after: Sweep | None, limit: int) -> Sequence[Sweep]:
    """Up to `limit` + 1 sweeps, newest first."""
    return session.scalars(keyset(readable(project), (Sweep.created_at, Sweep.id), after, limit)).all()


def jobs(session: Session, sweep_ids: Sequence[str]) -> Sequence[Job]:
    """The trainings of sweeps and the evaluations of their models, in order of creation."""
    return session.scalars(select(Job).where(Job.sweep_id.in_(sweep_ids)).order_by(Job.created_at, Job.id)).all()
