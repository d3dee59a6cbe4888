"""The state of the whole installation, read from the database."""

import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, case, func, literal_column, or_, select
from sqlalchemy.orm import Session

from app.broker import Lane
from app.database import now
from app.derived_artifacts.tables import DerivedArtifact
from app.jobs import queue as job_queue
from app.jobs.states import ACTIVE, Status
from app.jobs.tables import Job
from app.webhooks.tables import WebhookDelivery, WebhookEndpoint
from app.workers import repository as workers
from app.workers.tables import Worker

SETTLED_SECONDS = 60.0
"""No transaction that is still open can write a job's end with an older time."""


class EndedGroup(NamedTuple):
    """A group of ended jobs. `code` is that of their error, "" for none."""

    status: str
    code: str
    project: str
    base_model: str
    worker: str
    """The lane and the host that ran them last; "" if none did."""


@dataclass(frozen=True)
class Snapshot:
    """The installation at one moment. Times are durations in seconds."""

    jobs: dict[str, int]
    """Number of jobs by status. `paused` counts queued jobs on hold, and those that wait for people."""
    attempts: int
    """Sum over all jobs. More than two attempts of a job mean that some were lost, paused or handed back."""
    oldest_waiting: float
    """Waiting time of the oldest job in the queue."""
    leases: dict[str, int]
    """Number of leases: `held`, and `expired`, whose worker is silent and which the reaper has not taken away yet."""
    tokens_per_second: float
    """Sum over all running trainings."""
    peak_memory_bytes: int
    """Largest peak of a running training."""
    derived_artifacts: dict[str, int]
    """Number of reports and merges that are not ready, by kind."""
    webhooks_due: int
    webhook_lag: float
    """How long the oldest due delivery has been due."""
    workers: dict[str, int]
    """Number of workers by lane."""
    workers_out_of_service: int
    """Number of GPU workers that claim no jobs, because their device fails."""
    workers_without_store: int
    """Number of workers that claim no jobs, because they cannot reach the object store."""
    set_back: int
    """Number of unfinished jobs that a fault of the object store, a disk or the database has set back."""
    ended: Counter[EndedGroup]
    """Number of ended jobs in each group."""
    webhooks_failing: int
    """Number of webhook deliveries that have failed and will be tried again."""
    webhooks_disabled: int
    """Number of webhook endpoints that are disabled."""
    present_workers: Sequence[Worker]
    """Workers that have reported lately."""


class EndedJobs:
    """The numbers of ended jobs by group, and of all their attempts.

    Each look counts only the jobs that have ended since the last. Jobs of the last minute are counted anew each time: a
    transaction may write an earlier time than one before it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts, self._attempts, self._counted_until = Counter[EndedGroup](), 0, -math.inf

    def count(self, session: Session) -> tuple[Counter[EndedGroup], int]:
        """(the number of jobs by group, the sum of their attempts)."""
        with self._lock:
            until = now(session) - SETTLED_SECONDS
            if until > self._counted_until:
                settled = self._read(session, Job.finished_at > self._counted_until, Job.finished_at <= until)
                self._counts, self._attempts = self._counts + settled[0], self._attempts + settled[1]
                self._counted_until = until
            recent = self._read(session, Job.finished_at > self._counted_until)
            return self._counts + recent[0], self._attempts + recent[1]

    @staticmethod
    def _read(session: Session, *conditions: ColumnElement[bool]) -> tuple[Counter[EndedGroup], int]:
        failed = case((Job.status == Status.FAILED, Job.error["code"].as_string()), else_="")
        group = (Job.status, func.coalesce(failed, ""), Job.project, Job.base_model, func.coalesce(Job.worker, ""))
        numbered: list[ColumnElement[Any]] = [literal_column(str(number)) for number, _ in enumerate(group, start=1)]
        statement = select(*group, func.count(), func.sum(Job.attempt)).where(*conditions).group_by(*numbered)
        rows = session.execute(statement).all()
        counts = Counter({EndedGroup(*names): count for *names, count, _ in rows})
        return counts, sum(int(attempts) for *_, attempts in rows)


def snapshot(session: Session, ended: EndedJobs) -> Snapshot:
    """Read the state once. It takes milliseconds, however long the history is, except at the first time."""
    on_hold = or_(Job.paused, Job.awaits.is_not(None)).label("on_hold")
    unfinished = select(Job.status, on_hold, func.count(), func.sum(Job.attempt)).where(Job.status.in_(ACTIVE))
    counts = session.execute(unfinished.group_by(Job.status, on_hold)).all()
    ended_counts, attempts = ended.count(session)
    jobs = {status.value: 0 for status in Status} | {"paused": 0}
    for group, count in ended_counts.items():
        jobs[group.status] += count
    for status, paused, count, active_attempts in counts:
        jobs["paused" if paused and status == Status.QUEUED else status] += count
        attempts += int(active_attempts)
    current = now(session)
    oldest = session.scalar(select(func.min(Job.created_at)).where(*job_queue.WAITING, Job.eligible_at <= current))
    leased = session.scalars(select(Job).where(Job.lease_owner.is_not(None), Job.status.in_(ACTIVE))).all()
    expired = sum(job.lease_expires_at is None or job.lease_expires_at < current for job in leased)
    training = [job for job in leased if job.status == Status.RUNNING]
    due = select(func.count(), func.min(WebhookDelivery.eligible_at)).where(WebhookDelivery.eligible_at <= current)
    due_count, first_due = session.execute(due).one()
    failing = select(func.count()).where(WebhookDelivery.eligible_at >= 0.0, WebhookDelivery.attempt > 0)
    disabled = select(func.count()).where(WebhookEndpoint.disabled_at.is_not(None))
    pending = session.execute(
        select(DerivedArtifact.kind, func.count())
        .where(DerivedArtifact.status == "pending")
        .group_by(DerivedArtifact.kind)
    )
    present = {lane: workers.present(session, lane) for lane in Lane}
    return Snapshot(
        jobs=jobs,
        attempts=attempts,
        oldest_waiting=0.0 if oldest is None else current - oldest,
        leases={"held": len(leased) - expired, "expired": expired},
        tokens_per_second=sum((job.progress or {}).get("tokens_per_second") or 0.0 for job in training),
        peak_memory_bytes=int(max(((job.metrics or {}).get("peak_memory_bytes") or 0 for job in training), default=0)),
        derived_artifacts=dict(pending.all()),
        webhooks_due=due_count,
        webhook_lag=0.0 if first_due is None else current - first_due,
        workers={lane.value: len(rows) for lane, rows in present.items()},
        workers_out_of_service=workers.device_out_of_service(present[Lane.GPU]),
        workers_without_store=sum(map(workers.without_store, present.values())),
        ended=ended_counts,
        webhooks_failing=session.scalars(failing).one(),
        webhooks_disabled=session.scalars(disabled).one(),
        present_workers=[worker for rows in present.values() for worker in rows],
        set_back=session.scalars(select(func.count()).where(Job.status.in_(ACTIVE), Job.setbacks > 0)).one(),
    )
