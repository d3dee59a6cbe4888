"""The table of derived artifacts: dataset reports and merged models."""

from sqlalchemy import Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table, index_where
from app.spec.json_types import JsonObject
from app.work_queue import Queued


class DerivedArtifact(Queued, Table):
    """Something that a worker makes once from a file or a model.

    `kind` says what it is. `subject` says what it is made from, and with which arguments.
    """

    # The table keeps its old name, because workers of an older version may run during an upgrade.
    __tablename__ = "tasks"
    __table_args__ = (
        UniqueConstraint("kind", "subject"),
        Index("ix_tasks_queue", "status", "created_at"),
        Index("ix_tasks_finished_at", "kind", "finished_at"),
        index_where("ix_tasks_leased", "lease_owner", where="lease_owner IS NOT NULL"),
    )

    kind: Mapped[str]
    subject: Mapped[str]
    owner: Mapped[str] = mapped_column(index=True)
    """The id of the file or the name of the model that it is made from. It is deleted with it."""
    project: Mapped[str]
    base_model: Mapped[str | None]
    """If set, only a worker that serves this base model can make the artifact."""
    arguments: Mapped[JsonObject]
    created_at: Mapped[float]
    finished_at: Mapped[float | None]
    status: Mapped[str]
    """`pending`, `done` or `failed`."""
    result: Mapped[JsonObject | None]
    error: Mapped[JsonObject | None]
