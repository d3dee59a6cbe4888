"""The table of projects."""

from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table


class Project(Table):
    """A project: every file, job, model and key belongs to one, and no other sees it. None is no limit."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    max_storage_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Bytes of files, of parts of uploads and of models made."""
    max_running_jobs: Mapped[int | None]
    """Trainings at a time; the others wait in the queue."""
