"""All SQL about usage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.database import Database, now
from app.projects import repository as projects
from app.projects.tables import Project
from app.usage.tables import Usage


def month_of(time: float) -> str:
    """The month of a time in unix seconds, as `YYYY-MM` in UTC."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m")


def of_month(session: Session, project: Project, time: float) -> Usage:
    """The row of a project's month, which is made if it is missing. The project must be locked."""
    key = (project.id, month_of(time))
    usage = session.get(Usage, key, populate_existing=True)
    if usage is None:
        usage = Usage(
            project=key[0], month=key[1], gpu_seconds=0.0, trained_tokens=0, storage_bytes=0, storage_byte_hours=0.0
        )
        session.add(usage)
    return usage


def measure_storage(database: Database, measured_at: float) -> float:
    """Add what each project stores to its month, as if it had stored it since `measured_at`. Returns the time of now.

    `measured_at` is the time of the last measurement, NaN before the first.
    """
    with database.read() as session:
        current = now(session)
        stored = {project.id: projects.storage_bytes(session, project.id) for project in projects.listed(session)}
    hours = 0.0 if math.isnan(measured_at) else max(0.0, current - measured_at) / 3600
    for project_id, stored_bytes in stored.items():
        with database.write() as session:
            usage = of_month(session, projects.lock(session, project_id), current)
            usage.storage_bytes = stored_bytes
            usage.storage_byte_hours += stored_bytes * hours
    return current


def listed(session: Session, project: str | None, first_month: str | None, last_month: str | None) -> Sequence[Usage]:
    """The usage of a project, or of all, by month and project. None leaves an end of the time open."""
    statement = select(Usage)
    if project is not None:
        statement = statement.where(Usage.project == project)
    if first_month is not None:
        statement = statement.where(Usage.month >= first_month)
    if last_month is not None:
        statement = statement.where(Usage.month <= last_month)
    return session.scalars(statement.order_by(Usage.month, Usage.project)).all()


@dataclass(frozen=True)
class Total:
    """The usage of a project so far, and the bytes that it stored when they were last measured."""

    project: str
    gpu_seconds: float
    trained_tokens: int
    storage_bytes: int


def totals(session: Session) -> list[Total]:
    """The totals of each project, by name."""
    found: dict[str, Total] = {}
    for usage in listed(session, None, None, None):  # a row for each project and month
        before = found.get(usage.project, Total(usage.project, 0.0, 0, 0))
        found[usage.project] = Total(
            usage.project,
            before.gpu_seconds + usage.gpu_seconds,
            before.trained_tokens + usage.trained_tokens,
            usage.storage_bytes,
        )
    return sorted(found.values(), key=lambda total: total.project)
