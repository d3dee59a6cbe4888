"""A lease held: a thread renews it, and another tells when it is lost, whatever the first is waiting for."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self, TypeVar

import structlog
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app import work_queue
from app.database import Database
from app.jobs import queue as job_queue
from app.jobs.queue import JOBS
from app.work_queue import WorkQueue

log = structlog.get_logger(__name__)

WATCH_SECONDS = 0.25
Result = TypeVar("Result")


class LeaseLost(Exception):
    """Another has the row, or nobody: stop, and write nothing."""


class Lease:
    """Renews the lease of one attempt while the block runs. `lost` turns true when another has the row.

    A database that does not answer may be away for this worker or for all: the work goes on for `OUTAGE_SECONDS` more
    than the lease. Where another has the row by then, its attempt fences off whatever this one writes.
    """

    def __init__(self, database: Database, queue: WorkQueue[Any], row_id: str, attempt: int) -> None:
        self.database, self.queue, self.row_id, self.attempt = database, queue, row_id, attempt
        self.log = log.bind(**{queue.noun: row_id}, attempt=attempt)
        self._lost = threading.Event()
        self._released = threading.Event()
        self._valid_until = time.monotonic() + self._good_for()
        self._callbacks: list[Callable[[], None]] = []
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._renew, self._watch)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        self._threads[1].join()  # the other may hang in the database; it writes nothing but a heartbeat

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    def wait_lost(self, seconds: float) -> bool:
        """Wait until the lease is lost, at most `seconds`; returns whether it is."""
        return self._lost.wait(seconds)

    def write(self, work: Callable[[Session], Result]) -> Result:
        """Run `work` in a transaction, again and again while the database is away and the lease is good.

        A connection may break when a commit is done and before this side hears of it: `work` must find out by itself
        that it is done already, after it has touched the row that it guards. Raises `LeaseLost`.
        """
        return self._insist(self.database.write, work)

    def read(self, work: Callable[[Session], Result]) -> Result:
        """The same for what only looks."""
        return self._insist(self.database.read, work)

    def _insist(
        self, begin: Callable[[], AbstractContextManager[Session]], work: Callable[[Session], Result]
    ) -> Result:
        while True:
            try:
                with begin() as session:
                    return work(session)
            except OperationalError as error:
                self.log.warning("database out of reach", reason=str(error.orig))
                if self.wait_lost(1.0):
                    raise LeaseLost from error

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback`, from another thread, when the lease is lost."""
        self._callbacks.append(callback)

    def heartbeat(self, session: Session) -> bool:
        """Renew the lease; False where it is another's."""
        return self.queue.heartbeat(session, self.row_id, self.attempt) is not None

    def _good_for(self) -> float:
        return self.queue.lease_seconds + work_queue.OUTAGE_SECONDS

    def _renew(self) -> None:
        while not self._released.wait(work_queue.HEARTBEAT_SECONDS):
            asked = time.monotonic()
            try:
                with self.database.write() as session:
                    held = self.heartbeat(session)
            except Exception as error:  # the database may be away for a while
                self.log.warning("heartbeat failed", reason=str(error))
                continue
            if not held:
                self._lost.set()
                return
            self._valid_until = asked + self._good_for()

    def _watch(self) -> None:
        told = False
        while not self._released.is_set():
            now = time.monotonic()
            late = now > self._valid_until - work_queue.OUTAGE_SECONDS
            if late and not told:
                self.log.warning("lease not renewed in time; going on")
            told = late
            if now > self._valid_until:
                self._lost.set()
            if self._lost.wait(WATCH_SECONDS):
                for callback in self._callbacks:
                    callback()
                return


class JobLease(Lease):
    """The lease of a job. Its heartbeats count the time that the job trained, and hear that it was paused."""

    def __init__(self, database: Database, job_id: str, attempt: int) -> None:
        super().__init__(database, JOBS, job_id, attempt)
        self._paused = threading.Event()

    @property
    def paused(self) -> bool:
        """Whether the job was paused while this attempt had it."""
        return self._paused.is_set()

    def heartbeat(self, session: Session) -> bool:
        held = job_queue.heartbeat(session, self.row_id, self.attempt)
        if held is not None and held.paused:
            self._paused.set()
        return held is not None
