"""What a look at the database tells of the whole installation."""

from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.database import now
from app.derived_artifacts.tables import DerivedArtifact
from app.jobs import queue as job_queue
from app.jobs.states import ACTIVE, Status
from app.jobs.tables import Job
from app.webhooks.tables import WebhookDelivery
from app.workers import repository as workers


@dataclass(frozen=True)
class Snapshot:
    """The installation at one moment; times are seconds."""

    jobs: dict[str, int]
    """By status; those that wait paused under `paused`."""
    attempts: int
    """Of all jobs together: what exceeds two a job was lost, paused or handed back."""
    oldest_waiting: float
    """How long the job that waits for longest has."""
    leases: dict[str, int]
    """`held`, and `expired`: of a worker that was not heard of and that housekeeping has not noticed yet."""
    tokens_per_second: float
    """Of all trainings that run."""
    peak_memory_bytes: int
    """The most that a training which runs has measured."""
    tasks: dict[str, int]
    """Reports and merges that wait or are being made, by kind."""
    webhooks_due: int
    webhook_lag: float
    """How long the delivery that is due for longest has been."""
    workers: dict[str, int]
    """By lane."""


def snapshot(session: Session) -> Snapshot:
    """Look once. It reads a few columns of every job: tens of milliseconds at ten thousand."""
    counted = session.execute(select(Job.status, Job.paused, func.count()).group_by(Job.status, Job.paused)).all()
    found = {status.value: 0 for status in Status} | {"paused": 0}
    for status, paused, count in counted:
        found["paused" if paused and status == Status.QUEUED else status] += count
    time = now(session)
    oldest = session.scalar(select(func.min(Job.created_at)).where(*job_queue.WAITING, Job.eligible_at <= time))
    unfinished = session.scalars(select(Job).where(Job.status.in_(ACTIVE), Job.lease_owner.is_not(None))).all()
    expired = sum(job.lease_expires_at is None or job.lease_expires_at < time for job in unfinished)
    training = [job for job in unfinished if job.status == Status.RUNNING]
    due = select(func.count(), func.min(WebhookDelivery.eligible_at)).where(WebhookDelivery.eligible_at <= time)
    waiting, first = session.execute(due).one()
    pending = session.execute(
        select(DerivedArtifact.kind, func.count())
        .where(DerivedArtifact.status == "pending")
        .group_by(DerivedArtifact.kind)
    )
    return Snapshot(
        jobs=found,
        attempts=session.scalar(select(func.coalesce(func.sum(Job.attempt), 0))) or 0,
        oldest_waiting=0.0 if oldest is None else time - oldest,
        leases={"held": len(unfinished) - expired, "expired": expired},
        tokens_per_second=sum((job.progress or {}).get("tokens_per_second") or 0.0 for job in training),
        peak_memory_bytes=int(max(((job.metrics or {}).get("peak_memory_bytes") or 0 for job in training), default=0)),
        tasks=dict(pending.all()),
        webhooks_due=waiting,
        webhook_lag=0.0 if first is None else time - first,
        workers={lane: len(workers.present(session, lane)) for lane in ("gpu", "cpu")},
    )
