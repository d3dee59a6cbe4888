"""Which project goes next: the one that has used the least GPU time lately, for its weight.

A project's use is what its jobs have run, halved each day, and what its running jobs are expected to run. So a project
with one job does not wait behind another's thousands, and two projects that both wait share the GPUs by their weights.
Batch systems call this fair share with a half-life (Slurm's multifactor priority, HTCondor's user priorities).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, SQLColumnExpression, select
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


class Candidate(NamedTuple):
    """A project that may go next: its use and its last check, as in its row, and the time now."""

    project: str
    weight: float
    recent_seconds: float
    recent_at: float
    checked_at: float
    first_at: float
    """When the first of its jobs was created."""
    current: float


Candidates = Select[Any, Any, Any, Any, Any, Any, Any]


def candidates(order: Order, *conditions: ColumnElement[bool]) -> Candidates:
    """Selects the `Candidate`s: all projects, and when the first of their jobs with `conditions` was created.

    `order` is that of a project's jobs. The conditions may name columns of `Project`.
    """
    first = select(Job.created_at).where(Job.project == Project.id, *conditions).order_by(*order).limit(1)
    columns = (Project.id, Project.weight, Project.recent_seconds, Project.recent_at, Project.checked_at)
    return select(*columns, first.correlate(Project).scalar_subquery(), database_now())


def by_use(session: Session, statement: Candidates) -> list[Share]:
    """Those of the `candidates` that have a job, next one first."""
    found = _found(session, statement)
    if not found:
        return []
    running = defaultdict[str, float](float)
    columns = select(
        Job.project, Job.estimated_seconds, Job.ran_seconds, Job.counted_seconds, Job.least_devices, Job.devices
    ).where(Job.status == Status.RUNNING)
    for name, estimated, ran, counted, least, devices in session.execute(columns):
        taken = devices or 1  # the estimate is for the fewest devices
        running[name] += max(least * expected_seconds(estimated), taken * ran) - taken * counted
    shares = [
        Share(
            row.project,
            row.weight,
            used_lately(row.recent_seconds, row.recent_at, row.current) + running[row.project],
            row.first_at,
        )
        for row in found
    ]
    return sorted(shares, key=Share.turn)


def by_last_check(session: Session, statement: Candidates) -> list[str]:
    """The same projects, in turn: first the one whose last check of a job's files began first."""
    found = _found(session, statement)
    found.sort(key=lambda row: (row.checked_at, row.first_at, row.project))
    return [row.project for row in found]


def _found(session: Session, statement: Candidates) -> list[Candidate]:
    return [row for row in map(Candidate._make, session.execute(statement)) if row.first_at is not None]


def used_lately(seconds: float, counted_at: float, current: float) -> float:
    """GPU seconds that count at the time `current` if they were `seconds` at the time `counted_at`."""
    age = max(0.0, current - counted_at)  # a clock that was set back makes nothing grow
    return float(seconds * 0.5 ** (age / HALF_LIFE))


def count_use(session: Session, job: Job, trained_tokens: int = 0) -> None:
    """Add what a job has run since the last count, and tokens, to the use of its project. Its row must be locked."""
    seconds = (job.devices or 1) * (job.ran_seconds - job.counted_seconds)
    if seconds <= 0 and trained_tokens == 0:
        return
    current, project = now(session), projects.lock(session, job.project)
    project.recent_seconds = used_lately(project.recent_seconds, project.recent_at, current) + seconds
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
