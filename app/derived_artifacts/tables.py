"""The table of tasks."""

from typing import Any

from sqlalchemy import Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table


class Task(Table):
    """Something to be made once: `subject` says what of `kind`. As with jobs, the row is the truth."""

    __tablename__ = "tasks"
    __table_args__ = (UniqueConstraint("kind", "subject"), Index("ix_tasks_queue", "status", "created_at"))

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    subject: Mapped[str]
    owner: Mapped[str] = mapped_column(index=True)
    """The id of the file, or the name of the model, that it goes with."""
    project: Mapped[str]
    base_model: Mapped[str | None]
    """Only a worker that serves it can do the task."""
    arguments: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    finished_at: Mapped[float | None]
    status: Mapped[str]
    """`pending`, `done` or `failed`."""
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]

    attempt: Mapped[int]
    lease_owner: Mapped[str | None]
    lease_expires_at: Mapped[float | None]
    eligible_at: Mapped[float]
    lost_attempts: Mapped[int]
