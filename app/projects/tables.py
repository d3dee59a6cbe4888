"""The table of projects."""

from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table


class Project(Table):
    """A project. Each file, job, trained model and key belongs to one, and no other project sees it.

    A limit of None means no limit.
    """

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    max_storage_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Bytes of files, pending uploads (at their full size) and trained models."""
    max_running_jobs: Mapped[int | None]
    """Jobs that run at a time, evaluations included. The others wait in the queue."""
