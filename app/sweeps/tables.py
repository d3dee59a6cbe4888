"""The table of sweeps; their jobs are in that of jobs."""

from typing import Any

from sqlalchemy import Index
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table, database_now


class Sweep(Table):
    """A grid, and what each of its jobs has of it."""

    __tablename__ = "sweeps"
    __table_args__ = (Index("ix_sweeps_project_created_at", "project", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    created_at: Mapped[float] = mapped_column(default=database_now())
    name: Mapped[str | None]
    grid: Mapped[dict[str, Any]]
    settings: Mapped[dict[str, Any]]
    """Of each job, by its id, its value of each field of the grid; and `frontier`, the two metrics that it is of."""
    sweep_metadata: Mapped[dict[str, Any] | None]
