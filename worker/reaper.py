"""Take away the leases of lost workers, so that others go on with the work. Several reapers may run at once."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import union_all
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app import work_queue
from app.broker import Lane
from app.database import Database, now
from app.derived_artifacts import repository as artifacts
from app.derived_artifacts.tables import DerivedArtifact
from app.installation import require_writes
from app.jobs import queries, transitions
from app.jobs.queue import JOBS
from app.jobs.states import Actor, Status
from app.jobs.tables import Job
from app.services import Services
from app.webhooks import repository as webhooks
from app.webhooks.tables import WebhookDelivery
from app.work_queue import Queued, WorkQueue

log = structlog.get_logger(__name__)

MAX_GAP_SECONDS = work_queue.LEASE_SECONDS - work_queue.HEARTBEAT_SECONDS - 2.0
"""A gap of this length between two inspections cannot end a lease that its worker renews."""
DRIFT_SECONDS = 2.0
"""Difference between the clocks of this process and of the database that counts as a jump of a clock."""
UNRENEWED_SECONDS = work_queue.HEARTBEAT_SECONDS + 2.0
"""A lease that does not change for this long is not being renewed, whatever the clocks show."""
HeldLease = tuple[str, int, float | None]
"""(row id, attempt, end) of a lease, as its row has them."""


@dataclass(frozen=True)
class Inspection:
    """An inspection after which leases may be taken away."""

    own_time: float
    """When it was made, by this process's monotonic clock."""
    database_time: float
    """When it was made, by the database's clock."""
    outage_ended_at: float
    """When the last outage ended that this process has seen, by the database's clock."""
    unrenewed: frozenset[HeldLease]
    """The leases that nobody has renewed for `UNRENEWED_SECONDS`."""

    def ended_in_outage(self, row: Queued) -> bool:
        """Whether the lease of a row ran out while its worker could not renew it."""
        return row.lease_expires_at is not None and row.lease_expires_at < self.outage_ended_at


class Reaper:
    """Takes leases away, after it has been in contact with the database for the length of a lease without a break.

    An outage or a jump of the database's clock also kept the workers from renewing their leases. After it, they get
    the length of one lease to do so. The same holds after the start of this process, which cannot know what was before.
    A clock that was wrong between two inspections can leave any end time in a lease, until its worker renews it. The
    reaper therefore takes only leases that it has itself seen unrenewed.

    A lease that ran out in an outage says nothing about its worker. Its attempt is set back, and not counted as lost.
    """

    def __init__(self, services: Services) -> None:
        self.services = services
        self._last: tuple[float, float] | None = None
        """(own time, database time) of the last inspection."""
        self._in_touch_since = 0.0
        self._outage_ended_at = -math.inf
        self._first_seen: dict[HeldLease, float] = {}
        """When each lease was first seen with its present end."""

    def inspect(self) -> None:
        """Take expired leases away unless there was a break, and wake the workers that have work again."""
        with self.services.database.read() as session:
            database_time = now(session)
            leases = session.execute(union_all(*(queue.leases() for queue, _ in QUEUES))).all()
            orphans = bool(queries.orphans(session))
        own_time, held_leases = time.monotonic(), {(row_id, attempt, end) for row_id, attempt, end in leases}
        in_touch, unrenewed = self.in_touch(own_time, database_time), self.unrenewed(own_time, held_leases)
        if unrenewed and not self._can_write():
            self._broke_off(own_time, database_time)
        elif unrenewed and in_touch >= work_queue.LEASE_SECONDS:
            inspection = Inspection(own_time, database_time, self._outage_ended_at, unrenewed)
            for lane in reap(self.services.database, inspection):
                self.services.broker.wake(lane)
        if orphans:
            cancel_orphans(self.services.database)

    def in_touch(self, own_time: float, database_time: float) -> float:
        """Seconds of contact with the database without a break, up to the inspection at these times."""
        last, self._last = self._last, (own_time, database_time)
        if last is None:
            self._in_touch_since = own_time
            return 0.0
        own_passed, database_passed = own_time - last[0], database_time - last[1]
        if own_passed > MAX_GAP_SECONDS or abs(database_passed - own_passed) > DRIFT_SECONDS:
            self._broke_off(own_time, database_time)
        return own_time - self._in_touch_since

    def _broke_off(self, own_time: float, database_time: float) -> None:
        """Begin to wait for the workers' heartbeats again. An outage has ended at these times, or goes on."""
        log.warning("no lease is taken for a while: the database was away or read-only, or its clock was set")
        self._in_touch_since, self._outage_ended_at = own_time, database_time

    def _can_write(self) -> bool:
        """Whether the database takes writes. While it only answers, no worker can renew its lease."""
        try:
            require_writes(self.services.database)
        except SQLAlchemyError as error:
            log.warning("the database takes no writes", reason=str(error))
            return False
        return True

    def unrenewed(self, own_time: float, held_leases: set[HeldLease]) -> frozenset[HeldLease]:
        """Those of `held_leases`, the leases that are held now, that have not changed for `UNRENEWED_SECONDS`."""
        self._first_seen = {lease: self._first_seen.get(lease, own_time) for lease in held_leases}
        return frozenset(lease for lease, first in self._first_seen.items() if own_time - first >= UNRENEWED_SECONDS)


def reap(database: Database, inspection: Inspection | None = None) -> set[Lane]:
    """Take away expired leases that are unrenewed by `inspection`, or all expired ones without it.

    Returns the lanes that have work again. Nothing is taken if the inspection is not recent by both clocks. A lock may
    have delayed this transaction, and the workers' heartbeats with it.
    """
    lanes = set[Lane]()
    with database.write() as session:
        lapsed = [(queue, recover, queue.lapsed(session)) for queue, recover in QUEUES]
        if inspection is not None and not _is_recent(session, inspection):
            return lanes
        for queue, recover, rows in lapsed:
            for row in rows:
                if inspection is None or (row.id, row.attempt, row.lease_expires_at) in inspection.unrenewed:
                    row_field = {queue.noun: row.id}
                    log.warning("lease expired", **row_field, attempt=row.attempt, owner=row.lease_owner)
                    lanes.add(recover(session, row, inspection is not None and inspection.ended_in_outage(row)))
    return lanes


def _recover_job(session: Session, job: Job, in_outage: bool) -> Lane:
    lane = Lane.GPU if job.status == Status.RUNNING else Lane.CPU
    if in_outage:
        transitions.set_back(session, job, Actor.HOUSEKEEPING, "The database was out of reach.")
    else:
        transitions.recover(session, job, Actor.HOUSEKEEPING, "The worker of this job was lost.")
    return lane


def _recover_artifact(session: Session, artifact: DerivedArtifact, in_outage: bool) -> Lane:
    if in_outage:
        artifacts.set_back(session, artifact)
    else:
        artifacts.recover(session, artifact, "The worker of this task was lost.")
    return Lane.CPU


def _recover_delivery(session: Session, delivery: WebhookDelivery, _in_outage: bool) -> Lane:
    webhooks.recover(session, delivery)
    return Lane.CPU


QUEUES: list[tuple[WorkQueue[Any], Callable[[Session, Any, bool], Lane]]] = [
    (JOBS, _recover_job),
    (artifacts.ARTIFACTS, _recover_artifact),
    (webhooks.DELIVERIES, _recover_delivery),
]
"""(queue, recovery of a row whose lease has run out). It is told whether that was in an outage.

It returns the lane that has work again.
"""


def cancel_orphans(database: Database) -> None:
    """Cancel evaluations that wait for a training that has failed or was cancelled."""
    with database.read() as session:
        orphans = [(job.id, Status(job.status), job.parent_id) for job in queries.orphans(session)]
    for job_id, status, parent_id in orphans:  # one transaction each: locks on several jobs could deadlock
        with database.write() as session:
            message = f"The training {parent_id} has left no model to evaluate."
            transitions.transition(session, job_id, status, Status.CANCELLED, actor=Actor.HOUSEKEEPING, message=message)


def _is_recent(session: Session, inspection: Inspection) -> bool:
    own_passed, database_passed = time.monotonic() - inspection.own_time, now(session) - inspection.database_time
    return max(own_passed, database_passed) <= DRIFT_SECONDS and database_passed >= 0
