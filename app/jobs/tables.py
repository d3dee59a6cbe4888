"""The tables of jobs, their events and their checkpoints."""

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.database import PlainText, Table, database_now
from app.work_queue import Queued


class Job(Queued, Table):
    """A job. This row is the truth: whatever the broker delivers, what a worker does is decided here."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_queue", "status", "priority", "created_at"),
        Index("ix_jobs_finished_at", "finished_at"),
        Index("ix_jobs_project_created_at", "project", "created_at", "id"),
        Index("ix_jobs_parent", "parent_id"),
        Index("ix_jobs_sweep", "sweep_id"),
    )

    kind: Mapped[str] = mapped_column(default="training", server_default="training")
    """The name of its `JobKind`."""
    project: Mapped[str]
    created_at: Mapped[float] = mapped_column(default=database_now())
    model: Mapped[str]
    """As the user named it: a base model, a made one, or a checkpoint."""
    base_model: Mapped[str]
    """The base model below it, if any: a worker claims a job only where it can serve this one and its `OtherBase`s."""
    foundation: Mapped[str | None]
    """The fully trained model that stands in the base model's place, where `model` is one or sits on one."""
    training_file: Mapped[str]
    """Of an evaluation its data."""
    validation_file: Mapped[str | None]
    spec: Mapped[dict[str, Any]]
    """The resolved `JobSpec` or `EvaluationSpec`."""
    job_metadata: Mapped[dict[str, Any] | None]
    request_id: Mapped[str | None]
    """The request that made it, to be found in the logs by."""
    priority: Mapped[int]

    timeout_seconds: Mapped[int | None]

    status: Mapped[str]
    paused: Mapped[bool]
    """Not to be started; a running job writes a checkpoint and goes back to the queue."""
    stage: Mapped[str | None]
    progress: Mapped[dict[str, Any] | None]
    metrics: Mapped[dict[str, Any] | None]
    gates: Mapped[list[dict[str, Any]] | None]
    """Each gate of the spec with its verdict, once the job has succeeded."""
    parent_id: Mapped[str | None]
    """Of an evaluation the training whose model it is of: it waits until that has succeeded."""
    sweep_id: Mapped[str | None]
    """The sweep that the job is of."""
    evaluations: Mapped[dict[str, Any] | None]
    """Of a training the ids of its evaluations, by their names."""
    started_at: Mapped[float | None]
    ran_seconds: Mapped[float]
    """How long workers trained it, over all attempts, up to the last heartbeat."""
    estimated_seconds: Mapped[float | None]
    """How long it was expected to train when its files were checked."""
    pace: Mapped[dict[str, Any] | None]
    """What its last attempt measured: `tokens`, `seconds` and `overhead_seconds` before the first step."""
    finished_at: Mapped[float | None]
    error: Mapped[dict[str, Any] | None]
    fine_tuned_model: Mapped[str | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    result_files: Mapped[list[str]]

    @property
    def makes(self) -> str:
        """The name of the model that a training makes: `ft:{base}:{project}:{suffix}:{8 characters of its id}`."""
        suffix, own = self.spec["suffix"] or "", self.id.removeprefix("ftjob-")[:8].lower()
        return f"ft:{self.base_model}:{self.project}:{suffix}:{own}"


class OtherBase(Table):
    """A base model that a job needs beside its own: below what it is held to, compared with or judged by."""

    __tablename__ = "job_other_bases"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    base_model: Mapped[str] = mapped_column(primary_key=True)


class JobEvent(Table):
    """Something that happened to a job, in the order of `sequence`."""

    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_job", "job_id", "sequence"),)

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str] = mapped_column(PlainText)
    data: Mapped[dict[str, Any] | None]


class Checkpoint(Table):
    """A checkpoint whose objects are all there: `model/` to use, `state/` to resume from."""

    __tablename__ = "checkpoints"
    __table_args__ = (Index("ix_checkpoints_job", "job_id", "step_number"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]
    stage: Mapped[str]
    step_number: Mapped[int]
    model_name: Mapped[str] = mapped_column(unique=True)
    metrics: Mapped[dict[str, Any]]
    prefix: Mapped[str]
