"""The checkpoints of a job that runs: stored whole, fetched only where they are as they were written, and bounded."""

import shutil
import time
from pathlib import Path

import structlog
from sqlalchemy.orm import Session

from app.database import new_id
from app.jobs import checkpoints as job_checkpoints
from app.jobs import events as job_events
from app.jobs.checkpoints import MAX_CHECKPOINTS
from app.jobs.queue import JOBS
from app.jobs.tables import Checkpoint, Job
from app.models import repository as models
from app.spec.job import JobSpec
from app.storage import Storage
from worker import manifest
from worker.lease import Lease, LeaseLost

log = structlog.get_logger(__name__)

LEAVE_SECONDS = 600.0
"""For those who download a checkpoint that is not to be kept."""
RESUMABLE = 2
"""Checkpoints of a job that can be resumed from: the latest, and one more should that be damaged."""


class Checkpoints:
    """Those of one attempt at one job, and what the attempts before it left."""

    def __init__(self, storage: Storage, lease: Lease, job: Job) -> None:
        self.storage, self.lease, self.job = storage, lease, job
        self.keep = JobSpec.stored(job.spec).keep_checkpoints
        self.log = log.bind(job=job.id, attempt=job.attempt, request=job.request_id)
        self._stateless: set[str] = set()
        """Prefixes of checkpoints whose `state/` is gone."""
        self._leaving: list[tuple[float, str]] = []
        """(when, prefix) of the objects of checkpoints whose rows are gone."""

    def store(self, prefix: str, folder: Path) -> None:
        """Move `folder` to the object store. It is a checkpoint only once the database has its row."""
        self.storage.put_folder(prefix, folder)
        shutil.rmtree(folder)

    def fetch(self, place: Path) -> None:
        """Bring the latest checkpoint that can be resumed from, and is as it was written, to `place`."""
        saved = self.lease.read(
            lambda session: job_checkpoints.page(session, self.job.id, after=None, limit=MAX_CHECKPOINTS)
        )
        for checkpoint in saved or []:
            if not self.storage.list(f"{checkpoint.prefix}/state"):
                continue  # an old one: only its model is kept
            for _ in range(2):  # what was damaged on the way is fetched once more
                shutil.rmtree(place, ignore_errors=True)
                self.storage.get_folder(checkpoint.prefix, place)
                damage = manifest.damage(place)
                if damage is None:
                    return
            shutil.rmtree(place)
            self.log.error("damaged checkpoint", prefix=checkpoint.prefix, damage=damage)
            self._tell(
                f"The checkpoint at step {checkpoint.step_number} cannot be used ({damage}); going back behind it."
            )

    def trim(self) -> None:
        """Keep as many as the job wants, and those that others need; of old ones only what can be used.

        The rows go first, the objects a while later: someone may be downloading them. What fails is done when the job
        has ended.
        """
        surplus: list[str] = []

        def write(session: Session) -> list[Checkpoint]:
            self._guard(session)
            saved = job_checkpoints.page(session, self.job.id, after=None, limit=MAX_CHECKPOINTS) or []
            left = job_checkpoints.left_by(session, self.job.id, "sft")
            old = [one for one in saved[self.keep :] if left is None or one.id != left.id]
            job_checkpoints.hold(session, [one.id for one in old])
            old = [one for one in old if not models.users_of(session, one.model_name)]
            job_checkpoints.forget(session, [one.id for one in old])
            surplus[:] = [one.prefix for one in old]
            return saved

        saved = self.lease.write(write)
        now = time.monotonic()
        self._leaving += [(now + LEAVE_SECONDS, prefix) for prefix in surplus]
        for old in saved[RESUMABLE:]:
            if old.prefix not in self._stateless:
                self._remove(f"{old.prefix}/state")
                self._stateless.add(old.prefix)
        for due, prefix in list(self._leaving):
            if due <= now:
                self._remove(prefix)
                self._leaving.remove((due, prefix))

    def _guard(self, session: Session) -> None:
        """Hold the job's row while this attempt has it. Raises `LeaseLost` where it has not."""
        if not JOBS.write(session, self.job.id, self.job.attempt, lost_attempts=Job.lost_attempts):
            raise LeaseLost

    def _tell(self, message: str) -> None:
        """Warn in the job's events."""
        event = new_id("ftevent")

        def write(session: Session) -> None:
            self._guard(session)
            if not job_events.any_of(session, [event]):
                job_events.add(session, self.job.id, message, level="warn", id=event)

        self.lease.write(write)

    def _remove(self, prefix: str) -> None:
        """Delete objects that nobody needs any more. Where that fails, they go when the job has ended."""
        try:
            self.storage.delete_folder(prefix)
        except Exception as error:
            self.log.warning("objects not removed", prefix=prefix, reason=str(error))
