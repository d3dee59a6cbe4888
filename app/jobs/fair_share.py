"""Which project goes next: the one that has used the least GPU time lately, for its weight.

A project's use is what its jobs have run, halved each day, and what its running jobs are expected to run. So a project
with one job does not wait behind another's thousands, and two projects that both wait share the GPUs by their weights.
Batch systems call this fair share with a half-life (Slurm's multifactor priority, HTCondor's user priorities).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, SQLColumnExpression, select
from sqlalchemy.orm import Session

from app.database import Database, database_now, now
from app.jobs.states import Status
from app.jobs.tables import Job
from app.projects import repository as projects
from app.projects.tables import Project
from app.usage import repository as usage

HALF_LIFE = 86400.0
"""Seconds after which GPU time counts half."""
UNKNOWN_SECONDS = 600.0
"""GPU seconds that are expected of a job of which nobody has estimated them."""
Order = Sequence[SQLColumnExpression[Any]]


@dataclass
class Share:
    """A project with jobs that could begin."""

    project: str
    weight: float
    seconds: float
    """GPU seconds that it has used lately, and that its running jobs are expected to use."""
    first_at: float
    """When the first of the jobs was created."""

    def turn(self) -> tuple[float, float, str]:
        """The project with the smallest turn goes next. If two have used the same, it is that of the older job."""
        return self.seconds / self.weight, self.first_at, self.project


def expected_seconds(estimated: float | None, ran: float = 0.0) -> float:
    """GPU seconds that a job is expected to use in all, `ran` of which it has used."""
    return max(UNKNOWN_SECONDS if estimated is None else estimated, ran)


def by_use(session: Session, order: Order, *conditions: ColumnElement[bool]) -> list[Share]:
    """The projects that have a job with `conditions`, next one first. `order` is that of a project's jobs.

    The conditions may name columns of `Project`.
    """
    found = _projects(session, order, conditions)
    if not found:
        return []
    current, running = found[0][2], defaultdict[str, float](float)
    columns = select(Job.project, Job.estimated_seconds, Job.ran_seconds, Job.counted_seconds)
    for name, estimated, ran, counted in session.execute(columns.where(Job.status == Status.RUNNING)):
        running[name] += expected_seconds(estimated, ran) - counted
    shares = [
        Share(project.id, project.weight, used_lately(project, current) + running[project.id], first_at)
        for project, first_at, _ in found
    ]
    return sorted(shares, key=Share.turn)


def by_last_check(session: Session, order: Order, *conditions: ColumnElement[bool]) -> list[str]:
    """The same projects, in turn: first the one whose last check of a job's files began first."""
    found = _projects(session, order, conditions)
    found.sort(key=lambda row: (row[0].checked_at, row[1], row[0].id))
    return [project.id for project, _, _ in found]


def _projects(
    session: Session, order: Order, conditions: Sequence[ColumnElement[bool]]
) -> list[tuple[Project, float, float]]:
    """The projects that have a job with `conditions`: (project, when the first of these was created, the time now)."""
    first = select(Job.created_at).where(Job.project == Project.id, *conditions).order_by(*order).limit(1)
    rows = session.execute(select(Project, first.correlate(Project).scalar_subquery(), database_now()))
    return [(project, first_at, current) for project, first_at, current in rows if first_at is not None]


def used_lately(project: Project, current: float) -> float:
    """GPU seconds that a project has used lately, as they count at the time `current`."""
    age = max(0.0, current - project.recent_at)  # a clock that was set back makes nothing grow
    return float(project.recent_seconds * 0.5 ** (age / HALF_LIFE))


def count_use(session: Session, job: Job, trained_tokens: int = 0) -> None:
    """Add what a job has run since the last count, and tokens, to the use of its project. Its row must be locked."""
    seconds = job.ran_seconds - job.counted_seconds
    if seconds <= 0 and trained_tokens == 0:
        return
    current, project = now(session), projects.lock(session, job.project)
    project.recent_seconds = used_lately(project, current) + seconds
    project.recent_at = current
    month = usage.of_month(session, project, current)
    month.gpu_seconds += seconds
    month.trained_tokens += trained_tokens
    job.counted_seconds = job.ran_seconds


def count_running(database: Database) -> None:
    """Add what the running jobs have run so far to the use of their projects."""
    uncounted = (Job.status == Status.RUNNING, Job.ran_seconds > Job.counted_seconds)
    with database.read() as session:
        job_ids = session.scalars(select(Job.id).where(*uncounted)).all()
    for job_id in job_ids:  # each in a transaction of its own, which locks one job and one project
        with database.write() as session:
            job = session.scalar(select(Job).where(Job.id == job_id, *uncounted).with_for_update())
            if job is not None:
                count_use(session, job)
