"""The table of derived artifacts: dataset reports and merged models."""

from typing import Any

from sqlalchemy import Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table
from app.work_queue import Queued


class DerivedArtifact(Queued, Table):
    """Something that is made once from a file or a model: `subject` says of which, `kind` says what.

    As with jobs, the row is the truth.
    """

    # The table keeps its first name: a worker of an older version goes on while a newer one starts.
    __tablename__ = "tasks"
    __table_args__ = (UniqueConstraint("kind", "subject"), Index("ix_tasks_queue", "status", "created_at"))

    kind: Mapped[str]
    subject: Mapped[str]
    owner: Mapped[str] = mapped_column(index=True)
    """The id of the file, or the name of the model, that it goes with."""
    project: Mapped[str]
    base_model: Mapped[str | None]
    """Only a worker that serves it can make the artifact."""
    arguments: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    finished_at: Mapped[float | None]
    status: Mapped[str]
    """`pending`, `done` or `failed`."""
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
