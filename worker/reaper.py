"""Take the leases of workers that are gone, so that others go on. That several reapers look at once is harmless."""

import time

import structlog

from app.broker import Lane
from app.database import Database
from app.jobs import repository
from app.jobs.states import Actor, Status
from app.services import Services
from app.tasks import repository as tasks

log = structlog.get_logger(__name__)

OUTAGE_SECONDS = repository.LEASE_SECONDS - repository.HEARTBEAT_SECONDS - 2.0
"""A break shorter than this ends no lease that its worker renews."""
DRIFT_SECONDS = 2.0


class Reaper:
    """Reaps only after it has been in touch with the database, without a break, for as long as a lease lasts.

    What was an outage for this process, or a jump of the database's clock, was one for the workers too, who have had
    no time to renew their leases since: they get one lease's time. A process that has just started cannot know.
    """

    def __init__(self, services: Services) -> None:
        self.services = services
        self._last: tuple[float, float] | None = None
        self._since = 0.0

    def look(self) -> None:
        """Take expired leases away, unless there was a break, and wake the workers that have work again."""
        with self.services.database.read() as session:
            shown = repository.now(session)
        own = time.monotonic()
        if self.in_touch(own, shown) >= repository.LEASE_SECONDS:
            for lane in reap(self.services.database, (own, shown)):
                self.services.broker.wake(lane)

    def in_touch(self, own: float, shown: float) -> float:
        """Seconds without a break, at a look whose time is `own` by this process's clock, `shown` by the database's."""
        last, self._last = self._last, (own, shown)
        if last is None:
            self._since = own
        elif own - last[0] > OUTAGE_SECONDS or abs((shown - last[1]) - (own - last[0])) > DRIFT_SECONDS:
            log.warning("no lease is taken for a while: the database was away, or its clock was set")
            self._since = own
        return own - self._since


def reap(database: Database, looked: tuple[float, float] | None = None) -> set[Lane]:
    """Take expired leases away. Returns the lanes that have work again.

    `looked` is when that was found to be right, by this process's clock and by the database's: where both do not agree
    that it was just now, as after a wait for a lock that kept heartbeats waiting too, nothing is taken.
    """
    lanes = set[Lane]()
    with database.write() as session:
        jobs = repository.expired(session)
        if looked is not None:
            passed, shown = time.monotonic() - looked[0], repository.now(session) - looked[1]
            if max(passed, shown) > DRIFT_SECONDS or shown < 0:
                return lanes
        for job in jobs:
            log.warning("lease expired", job=job.id, attempt=job.attempt, owner=job.lease_owner)
            lanes.add(Lane.GPU if job.status == Status.RUNNING else Lane.CPU)
            repository.recover(session, job, Actor.HOUSEKEEPING, "The worker of this job was lost.")
        for task in tasks.expired(session):
            log.warning("lease expired", task=task.id, attempt=task.attempt, owner=task.lease_owner)
            lanes.add(Lane.CPU)
            tasks.hand_back(session, task, "The worker of this task was lost.")
    return lanes
