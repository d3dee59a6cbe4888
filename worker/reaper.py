"""Take the leases of workers that are gone, so that others go on. That several reapers look at once is harmless."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy.orm import Session

from app import work_queue
from app.broker import Lane
from app.database import Database, now
from app.derived_artifacts import repository as artifacts
from app.derived_artifacts.tables import DerivedArtifact
from app.jobs import queries, transitions
from app.jobs.queue import JOBS
from app.jobs.states import Actor, Status
from app.jobs.tables import Job
from app.services import Services
from app.webhooks import repository as webhooks
from app.webhooks.tables import WebhookDelivery
from app.work_queue import WorkQueue

log = structlog.get_logger(__name__)

OUTAGE_SECONDS = work_queue.LEASE_SECONDS - work_queue.HEARTBEAT_SECONDS - 2.0
"""A break shorter than this ends no lease that its worker renews."""
DRIFT_SECONDS = 2.0
UNRENEWED_SECONDS = work_queue.HEARTBEAT_SECONDS + 2.0
"""A lease that stays as it is for so long is not being renewed, whatever the clocks were meanwhile."""
Held = tuple[str, int, float | None]
"""A lease as its row has it: whose, of which attempt, until when."""


@dataclass(frozen=True)
class Inspection:
    """That leases may be taken now: when that was found, by this process's clock and by the database's, and those that
    nobody has renewed for a while.
    """

    own: float
    shown: float
    unrenewed: frozenset[Held]


class Reaper:
    """Reaps only after it has been in touch with the database, without a break, for as long as a lease lasts, and only
    what it has itself seen unrenewed.

    What was an outage for this process, or a jump of the database's clock, was one for the workers too, who have had
    no time to renew their leases since: they get one lease's time. A process that has just started cannot know. A clock
    that was wrong between two looks leaves leases that end at any time; their workers write them again.
    """

    def __init__(self, services: Services) -> None:
        self.services = services
        self._last: tuple[float, float] | None = None
        self._since = 0.0
        self._seen: dict[Held, float] = {}
        """When each lease was first seen as it is."""

    def look(self) -> None:
        """Take expired leases away, unless there was a break, and wake the workers that have work again."""
        with self.services.database.read() as session:
            shown = now(session)
            found = [lease for queue, _ in QUEUES for lease in queue.leases(session)]
            orphans = bool(queries.orphans(session))
        own, held = time.monotonic(), {(whose, attempt, end) for whose, attempt, end in found}
        in_touch, unrenewed = self.in_touch(own, shown), self.unrenewed(own, held)
        if in_touch >= work_queue.LEASE_SECONDS and unrenewed:
            for lane in reap(self.services.database, Inspection(own, shown, unrenewed)):
                self.services.broker.wake(lane)
        if orphans:
            cancel_orphans(self.services.database)

    def in_touch(self, own: float, shown: float) -> float:
        """Seconds without a break, at a look whose time is `own` by this process's clock, `shown` by the database's."""
        last, self._last = self._last, (own, shown)
        if last is None:
            self._since = own
        elif own - last[0] > OUTAGE_SECONDS or abs((shown - last[1]) - (own - last[0])) > DRIFT_SECONDS:
            log.warning("no lease is taken for a while: the database was away, or its clock was set")
            self._since = own
        return own - self._since

    def unrenewed(self, own: float, held: set[Held]) -> frozenset[Held]:
        """Those of the leases that are `held` now that were the same some looks ago."""
        self._seen = {lease: self._seen.get(lease, own) for lease in held}
        return frozenset(lease for lease, first in self._seen.items() if own - first >= UNRENEWED_SECONDS)


def reap(database: Database, look: Inspection | None = None) -> set[Lane]:
    """Take expired leases away, of those that a reaper's `look` allows; returns the lanes that have work again.

    Where the clocks do not agree that the look was just now, as after a wait for a lock that kept heartbeats waiting
    too, nothing is taken.
    """
    lanes = set[Lane]()
    with database.write() as session:
        lapsed = [(queue, recover, queue.lapsed(session)) for queue, recover in QUEUES]
        if look is not None and not _just_now(session, look):
            return lanes
        for queue, recover, rows in lapsed:
            for row in rows:
                if look is None or (row.id, row.attempt, row.lease_expires_at) in look.unrenewed:
                    named = {queue.noun: row.id}
                    log.warning("lease expired", **named, attempt=row.attempt, owner=row.lease_owner)
                    lanes.add(recover(session, row))
    return lanes


def _recover_job(session: Session, job: Job) -> Lane:
    lane = Lane.GPU if job.status == Status.RUNNING else Lane.CPU
    transitions.recover(session, job, Actor.HOUSEKEEPING, "The worker of this job was lost.")
    return lane


def _recover_artifact(session: Session, artifact: DerivedArtifact) -> Lane:
    artifacts.recover(session, artifact, "The worker of this task was lost.")
    return Lane.CPU


def _recover_delivery(session: Session, delivery: WebhookDelivery) -> Lane:
    webhooks.recover(session, delivery)
    return Lane.CPU


QUEUES: list[tuple[WorkQueue[Any], Callable[[Session, Any], Lane]]] = [
    (JOBS, _recover_job),
    (artifacts.ARTIFACTS, _recover_artifact),
    (webhooks.DELIVERIES, _recover_delivery),
]
"""Every queue, and how a row of it whose worker was lost goes on; it returns the lane that has work again."""


def cancel_orphans(database: Database) -> None:
    """Cancel the evaluations that wait for a training that has failed or was cancelled."""
    with database.read() as session:
        orphans = [(job.id, Status(job.status), job.parent_id) for job in queries.orphans(session)]
    for job_id, status, parent_id in orphans:  # each in its own transaction: of locked rows nobody waits for another
        with database.write() as session:
            message = f"Its training {parent_id} has made no model."
            transitions.transition(session, job_id, status, Status.CANCELLED, actor=Actor.HOUSEKEEPING, message=message)


def _just_now(session: Session, look: Inspection) -> bool:
    passed, shown = time.monotonic() - look.own, now(session) - look.shown
    return max(passed, shown) <= DRIFT_SECONDS and shown >= 0
