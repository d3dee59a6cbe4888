"""The table of sweeps. Their jobs are rows of the table of jobs."""

from sqlalchemy import Index
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table, database_now
from app.spec.json_types import JsonObject


class Sweep(Table):
    """A sweep: its grid, and the grid values of each of its jobs."""

    __tablename__ = "sweeps"
    __table_args__ = (Index("ix_sweeps_project_created_at", "project", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    created_at: Mapped[float] = mapped_column(default=database_now())
    name: Mapped[str | None]
    grid: Mapped[JsonObject]
    settings: Mapped[JsonObject]
    """`jobs`: the grid values of each job, by its id. `frontier`: the two metrics of the frontier, or null."""
    sweep_metadata: Mapped[JsonObject | None]
