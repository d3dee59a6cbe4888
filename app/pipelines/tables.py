"""The tables of pipelines. Their stages are ordinary rows of the table of jobs."""

from sqlalchemy import ForeignKey, Index, Text
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Table, database_now, index_where
from app.spec.json_types import JsonObject


class Pipeline(Table):
    """A pipeline, and how far it is."""

    __tablename__ = "pipelines"
    __table_args__ = (
        Index("ix_pipelines_project", "project", "created_at", "id"),
        index_where("ix_pipelines_running", "created_at", where="status = 'running'"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    created_at: Mapped[float] = mapped_column(default=database_now())
    name: Mapped[str | None]
    spec: Mapped[JsonObject]
    """The `PipelineSpec` without the keys of endpoints."""
    sealed_spec: Mapped[str | None] = mapped_column(Text)
    """The whole spec, encrypted. None once the pipeline has ended."""
    request_id: Mapped[str | None]
    pipeline_metadata: Mapped[JsonObject | None]
    status: Mapped[str]
    """`running`, `succeeded`, `failed` or `cancelled`."""
    paused: Mapped[bool]
    round: Mapped[int]
    """The round that is under way, from 1."""
    variables: Mapped[JsonObject]
    """The values of the variables in this round."""
    results: Mapped[list[JsonObject]]
    """The rounds that have ended: `round`, `variables`, `model`, `gates_met`, and the `value` that decides."""
    stopped_by: Mapped[str | None]
    """`gate` if a gate that was not met has ended it before its last round."""
    model: Mapped[str | None]
    """The model that is its result."""
    error: Mapped[JsonObject | None]
    finished_at: Mapped[float | None]


class PipelineStage(Table):
    """A stage that has begun, and its job."""

    __tablename__ = "pipeline_stages"

    pipeline_id: Mapped[str] = mapped_column(ForeignKey("pipelines.id"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
