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
    """Bytes of files, pending uploads (at their full size), models, checkpoints and cached objects."""
    max_running_jobs: Mapped[int | None]
    """Jobs that run at a time, evaluations included. The others wait in the queue."""
    max_queued_jobs: Mapped[int | None] = mapped_column(server_default="2000")
    """Unfinished jobs that do not run. No more are accepted."""
    max_priority: Mapped[int | None] = mapped_column(server_default="10")
    """The highest priority that a job may have."""
    weight: Mapped[float] = mapped_column(default=1.0, server_default="1")
    """A project of weight 2 gets twice the GPU time of one of weight 1, as long as jobs of both wait."""
    recent_seconds: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """GPU seconds that its jobs used lately, as of `recent_at`. `app.jobs.fair_share` says how they fade."""
    recent_at: Mapped[float] = mapped_column(default=0.0, server_default="0")
    checked_at: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """When the last check of a job's files began. The project whose last one is longest ago goes next."""


class Reservation(Table):
    """Bytes of a project's storage that a request has reserved for what it is about to store."""

    __tablename__ = "storage_reservations"

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str] = mapped_column(index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[float] = mapped_column(index=True)
    """A request that has died reserves nothing after this time."""
