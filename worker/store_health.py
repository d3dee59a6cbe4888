"""Whether the object store can be read and written. A worker that doubts it claims no jobs: all would be set back."""

import time

import structlog

from app.storage import Storage

log = structlog.get_logger(__name__)

TRUST_SECONDS = 30.0
"""How long the store is trusted after it has answered."""


class StoreHealth:
    """The object store as this worker sees it, and `problem`: why the worker claims no jobs; None while it may."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.problem: str | None = None
        self._trusted_until = 0.0

    def usable(self) -> bool:
        """Whether the store answers. It is asked again after `TRUST_SECONDS`, or at once if it did not answer."""
        if time.monotonic() < self._trusted_until:
            return True
        try:
            self.storage.require_reads()
            self.storage.require_writes()
        except Exception as error:  # each error of the store means the same: no job can be done
            if self.problem is None:
                log.error("object store out of reach; no jobs are claimed", reason=str(error).splitlines()[0])
            self.problem = f"the object store does not answer ({type(error).__name__})"
            return False
        if self.problem is not None:
            log.info("object store back")
        self.problem = None
        self._trusted_until = time.monotonic() + TRUST_SECONDS
        return True

    def doubt(self) -> None:
        """Ask the store again before the next job."""
        self._trusted_until = 0.0
