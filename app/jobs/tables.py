"""The tables of jobs, their events and their checkpoints."""

from sqlalchemy import BigInteger, ForeignKey, Index, Text, desc, false, true
from sqlalchemy.orm import Mapped, mapped_column

from app.database import PlainText, RowNumber, Table, database_now, index_where
from app.spec.json_types import JsonObject
from app.spec.version import SPEC_VERSION
from app.stored_content import UNKNOWN, FolderContent
from app.work_queue import Queued


class Job(Queued, Table):
    """A job. This row is the source of truth: it decides what a worker does, whatever the broker delivers."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_line", "status", "project", desc("priority"), "created_at", "id"),
        Index("ix_jobs_finished_at", "finished_at"),
        Index("ix_jobs_kind", "project", "kind", "created_at", "id"),
        Index("ix_jobs_base", "base_model", "status", "finished_at"),
        index_where("ix_jobs_events_kept", "finished_at", where="events_kept", sqlite="events_kept = 1"),
        index_where("ix_jobs_unpacked", "finished_at", where="NOT events_packed", sqlite="events_packed = 0"),
        index_where("ix_jobs_leased", "lease_owner", where="lease_owner IS NOT NULL"),
        index_where("ix_jobs_foundation", "foundation", where="foundation IS NOT NULL"),
        index_where("ix_jobs_unlisted", "status", where="NOT inputs_listed", sqlite="inputs_listed = 0"),
        index_where(
            "ix_jobs_unlabelled", "project", "kind", "created_at", "id", where="NOT labelled", sqlite="labelled = 0"
        ),
        Index("ix_jobs_parent", "parent_id"),
        Index("ix_jobs_sweep", "sweep_id"),
    )

    kind: Mapped[str] = mapped_column(default="training", server_default="training")
    """The name of its `JobKind`."""
    project: Mapped[str]
    created_at: Mapped[float] = mapped_column(default=database_now())
    model: Mapped[str]
    """The model that the user named: a base model, a model made here, or a checkpoint."""
    base_model: Mapped[str]
    """The base model under `model`; empty if there is none. A worker must serve it and each `OtherBase` of the job."""
    foundation: Mapped[str | None]
    """The fully trained model that `model` is or is an adapter on, if any. It replaces the base model."""
    training_file: Mapped[str]
    """For an evaluation or a labelling: its data file."""
    validation_file: Mapped[str | None]
    spec: Mapped[JsonObject]
    """The resolved spec, as its `JobKind` reads it."""
    spec_version: Mapped[int] = mapped_column(default=SPEC_VERSION, server_default="1")
    """The version of the spec. Workers of an earlier version leave the job to others."""
    job_metadata: Mapped[JsonObject | None]
    request_id: Mapped[str | None]
    """Id of the request that created the job. The logs name it."""
    priority: Mapped[int]

    timeout_seconds: Mapped[int | None]

    status: Mapped[str]
    paused: Mapped[bool]
    """No worker starts a paused job. A running one writes a checkpoint and returns to the queue."""
    awaits: Mapped[str | None]
    """Who has to do something before a worker goes on with it: `people` who label. None: nobody."""
    stage: Mapped[str | None]
    progress: Mapped[JsonObject | None]
    metrics: Mapped[JsonObject | None]
    gates: Mapped[list[JsonObject] | None]
    """Each gate of the spec with its verdict. Set once the job has succeeded."""
    parent_id: Mapped[str | None]
    """For an evaluation: the training that asked for it, if any. The evaluation waits until that has succeeded."""
    sweep_id: Mapped[str | None]
    """The sweep that the job belongs to."""
    labelled: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Whether its metadata is in the table of labels. A version before 0021 does not write them."""
    inputs_listed: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Whether each file and model that it needs is a `JobInput`. A version before 0012 does not list them."""
    events_kept: Mapped[bool] = mapped_column(default=True, server_default=true())
    """Whether its events are there. Those of old jobs are deleted."""
    events_packed: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Whether its events were moved to blocks after its end. A few that came later are rows again."""
    evaluations: Mapped[JsonObject | None]
    """For a training: the ids of its evaluations, by name."""
    started_at: Mapped[float | None]
    worker: Mapped[str | None]
    """The lane and the host that ran it last, such as `gpu@host-1`."""
    ran_seconds: Mapped[float]
    """Seconds that workers ran it, over all attempts, up to the last heartbeat."""
    counted_seconds: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """The part of `ran_seconds` that is in the usage of its project."""
    estimated_seconds: Mapped[float | None]
    """Expected seconds of training, estimated when the files were checked."""
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Memory that a device needs at least for the job. None if it is not known: any device may try."""
    least_devices: Mapped[int] = mapped_column(default=1, server_default="1")
    """The fewest devices of one worker that an attempt starts with."""
    most_devices: Mapped[int] = mapped_column(default=1, server_default="1")
    """The most devices that an attempt takes, if they are free."""
    nodes: Mapped[int] = mapped_column(default=1, server_default="1")
    """The most machines that its devices may be on."""
    devices: Mapped[int | None]
    """The number of devices of the last attempt."""
    reserved_by: Mapped[str | None]
    """The worker that starts no job behind this one until it has enough free devices for it."""
    reserved_until: Mapped[float | None]
    """When the reservation ends, unless the worker renews it."""
    pace: Mapped[JsonObject | None]
    """Measured by the last attempt: `tokens`, `steps`, `seconds`, and `overhead_seconds` before the first step.

    If the model wrote the answers that it learned from, `writes` is true, and only that stage counts.
    """
    finished_at: Mapped[float | None]
    error: Mapped[JsonObject | None]
    fine_tuned_model: Mapped[str | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    result_files: Mapped[list[str]]

    @property
    def makes(self) -> str:
        """The name of the model that a training makes: `ft:{base}:{project}:{suffix}:{8 characters of its id}`."""
        suffix, short_id = self.spec["suffix"] or "", self.id.removeprefix("ftjob-")[:8].lower()
        return f"ft:{self.base_model}:{self.project}:{suffix}:{short_id}"


class OtherBase(Table):
    """A base model that a job needs beside its own: under its reference, its baseline or its judge."""

    __tablename__ = "job_other_bases"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    base_model: Mapped[str] = mapped_column(primary_key=True)


class JobInput(Table):
    """A file or a model that an unfinished job needs. The row is deleted when the job ends."""

    __tablename__ = "job_inputs"

    name: Mapped[str] = mapped_column(primary_key=True)
    """The id of the file or the name of the model."""
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True, index=True)


class JobLabel(Table):
    """A pair of a job's metadata, as `app.jobs.labels` writes it. The other columns are the job's."""

    __tablename__ = "job_labels"
    __table_args__ = (Index("ix_job_labels_pair", "project", "kind", "pair", "created_at", "job_id"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    pair: Mapped[str] = mapped_column(primary_key=True)
    project: Mapped[str]
    kind: Mapped[str]
    created_at: Mapped[float]


class JobEvent(Table):
    """Something that happened to a job, in the order of `sequence`."""

    __tablename__ = "job_events"
    __table_args__ = (
        Index("ix_job_events_job", "job_id", "sequence"),
        {"sqlite_autoincrement": True},  # else SQLite would give the numbers of packed events to new ones
    )

    sequence: Mapped[int] = mapped_column(RowNumber, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str] = mapped_column(PlainText)
    data: Mapped[JsonObject | None]


class EventBlock(Table):
    """Events of an ended job, compressed by `app.jobs.event_blocks`."""

    __tablename__ = "event_blocks"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    first_sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    last_sequence: Mapped[int] = mapped_column(BigInteger)
    ids: Mapped[str] = mapped_column(Text)
    """The ids of the events, each followed by a space."""
    content: Mapped[bytes]


class Checkpoint(Table):
    """A checkpoint that is completely stored: `model/` to use, `state/` to resume from."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        Index("ix_checkpoints_job", "job_id", "step_number"),
        Index("ix_checkpoints_created_at", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    project: Mapped[str | None] = mapped_column(index=True)
    """The job's project; None if a version before 0014 wrote the row."""
    created_at: Mapped[float]
    stage: Mapped[str]
    step_number: Mapped[int]
    model_name: Mapped[str] = mapped_column(unique=True)
    metrics: Mapped[JsonObject]
    prefix: Mapped[str]
    content_of: Mapped[str | None]
    """The prefix that the next three columns describe. The version before 0009 changes `prefix` alone."""
    objects: Mapped[int | None]
    """Number of objects in `model/`."""
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Their size together."""
    state_bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """Size of `state/`; 0 once it is deleted."""
    sha256: Mapped[str | None]
    """Hash of the names and contents of `model/`. `state/` has a manifest instead, because it is deleted earlier."""

    @property
    def content(self) -> FolderContent:
        """The content of `model/`."""
        known = self.content_of == self.prefix
        return FolderContent(self.objects, self.bytes, self.sha256) if known else UNKNOWN
