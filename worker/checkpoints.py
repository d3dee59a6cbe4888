"""The checkpoints of a running job: store them, fetch an undamaged one to resume from, and delete old ones."""

import shutil
import time
from functools import partial
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
from app.stored_content import FolderContent
from worker import manifest
from worker.lease import Lease, LeaseLost

log = structlog.get_logger(__name__)

DELETE_DELAY_SECONDS = 600.0
"""Time between the deletion of a checkpoint's row and its objects. A download that has begun can finish."""
RESUMABLE = 2
"""Number of checkpoints that a job can be resumed from: the latest, and one more in case it is damaged."""


class Checkpoints:
    """The checkpoints of one job, as one attempt reads and writes them."""

    def __init__(self, storage: Storage, lease: Lease, job: Job) -> None:
        self.storage, self.lease, self.job = storage, lease, job
        self.keep = JobSpec.stored(job.spec).keep_checkpoints
        self.log = log.bind(job=job.id, attempt=job.attempt, request=job.request_id)
        self._without_state: set[str] = set()
        """Prefixes of checkpoints whose `state/` was deleted."""
        self._to_delete: list[tuple[float, str]] = []
        """(due time, prefix) of checkpoints whose rows were deleted but whose objects remain."""

    def store(self, prefix: str, folder: Path) -> tuple[FolderContent, int]:
        """Move `folder` to the object store under `prefix`. The checkpoint counts only once it has a row.

        Returns the content of its model and the bytes of its training state, for the row.
        """
        content = FolderContent.of(folder / "model", manifest.hashes_below(folder, "model"))
        state_bytes = sum(path.stat().st_size for path in (folder / "state").rglob("*") if path.is_file())
        self.lease.outlast(partial(self.storage.put_folder, prefix, folder))
        shutil.rmtree(folder)
        return content, state_bytes

    def fetch(self, folder: Path) -> bool:
        """Download the latest resumable and undamaged checkpoint to `folder`; False if there is none."""
        saved = self.lease.read(
            lambda session: job_checkpoints.page(session, self.job.id, after=None, limit=MAX_CHECKPOINTS)
        )
        for number, checkpoint in enumerate(saved or []):
            if number >= RESUMABLE and not self.storage.list(f"{checkpoint.prefix}/state"):
                continue  # an old checkpoint, of which only the model is kept
            for _ in range(2):  # a second try, in case the download was damaged
                shutil.rmtree(folder, ignore_errors=True)
                self.storage.get_folder(checkpoint.prefix, folder)
                damage = manifest.damage(folder)
                if damage is None:
                    return True
            shutil.rmtree(folder, ignore_errors=True)
            self.log.error("damaged checkpoint", prefix=checkpoint.prefix, damage=damage)
            self._warn(f"The checkpoint at step {checkpoint.step_number} is skipped: {damage}.")
        return False

    def trim(self) -> None:
        """Delete old checkpoints, except those that other jobs or the baseline of an evaluation need.

        The job's `keep_checkpoints` says how many stay. Only the latest `RESUMABLE` ones keep their training state.
        Rows are deleted first, and objects `DELETE_DELAY_SECONDS` later. Objects that cannot be deleted now are
        deleted when the job has ended.
        """
        surplus: list[str] = []

        def write(session: Session) -> list[Checkpoint]:
            self._guard(session)
            saved = job_checkpoints.page(session, self.job.id, after=None, limit=MAX_CHECKPOINTS) or []
            sft_result = job_checkpoints.last_of_ended_stage(session, self.job.id, "sft")
            old = [row for row in saved[self.keep :] if sft_result is None or row.id != sft_result.id]
            job_checkpoints.lock(session, [row.id for row in old])
            old = [row for row in old if not models.users_of(session, row.model_name)]
            job_checkpoints.forget(session, [row.id for row in old])
            surplus[:] = [row.prefix for row in old]
            stateless = [row.id for row in saved[RESUMABLE:]]
            job_checkpoints.note_state_deleted(session, Checkpoint.id.in_(stateless))
            return saved

        saved = self.lease.write(write)
        now = time.monotonic()
        self._to_delete += [(now + DELETE_DELAY_SECONDS, prefix) for prefix in surplus]
        for old in saved[RESUMABLE:]:
            if old.prefix not in self._without_state:
                self._remove(f"{old.prefix}/state")
                self._without_state.add(old.prefix)
        for due, prefix in list(self._to_delete):
            if due <= now:
                self._remove(prefix)
                self._to_delete.remove((due, prefix))

    def _guard(self, session: Session) -> None:
        """Lock the job's row. Raises `LeaseLost` if this attempt no longer holds the lease."""
        if not JOBS.write(session, self.job.id, self.job.attempt, lost_attempts=Job.lost_attempts):
            raise LeaseLost

    def _warn(self, message: str) -> None:
        """Add a warning to the job's events, once even if the transaction is repeated."""
        event_id = new_id("ftevent")

        def write(session: Session) -> None:
            self._guard(session)
            if not job_events.any_of(session, [event_id]):
                job_events.add(session, self.job.id, message, level="warn", id=event_id)

        self.lease.write(write)

    def _remove(self, prefix: str) -> None:
        """Delete objects. If that fails, they are deleted when the job has ended."""
        try:
            self.storage.delete_folder(prefix)
        except Exception as error:
            self.log.warning("objects not removed", prefix=prefix, reason=str(error))
