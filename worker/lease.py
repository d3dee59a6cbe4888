"""A lease held: a thread renews it, and tells when it is lost."""

import threading
import time
from types import TracebackType

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.database import Database
from app.jobs import repository

log = structlog.get_logger(__name__)


class Lease:
    """Renews the lease of one attempt while the block runs. `lost` is set when another may have the job."""

    def __init__(self, database: Database, job_id: str, attempt: int) -> None:
        self.database, self.job_id, self.attempt = database, job_id, attempt
        self.lost = threading.Event()
        self._released = threading.Event()
        self._valid_until = time.monotonic() + repository.LEASE_SECONDS
        self._thread = threading.Thread(target=self._renew, name=f"lease-{job_id}", daemon=True)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._thread.join()

    def _renew(self) -> None:
        while not self._released.wait(repository.HEARTBEAT_SECONDS):
            asked = time.monotonic()
            try:
                with self.database.write() as session:
                    held = repository.heartbeat(session, self.job_id, self.attempt)
            except SQLAlchemyError as error:
                # The database may be away for a while; the lease is good until it expires.
                log.warning("heartbeat failed", job=self.job_id, reason=str(error))
                held = time.monotonic() < self._valid_until
            else:
                self._valid_until = asked + repository.LEASE_SECONDS
            if not held:
                self.lost.set()
                return
