"""Hold a lease. One thread renews it, and another one notices its loss even while the first hangs."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self, TypeVar

import structlog
from obstore.exceptions import BaseError
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app import work_queue
from app.database import Database
from app.jobs import queue as job_queue
from app.jobs.queue import JOBS
from app.work_queue import WorkQueue

log = structlog.get_logger(__name__)

STORE_PATIENCE_SECONDS, MOST_PAUSE_SECONDS = 600.0, 15.0
"""How long an attempt waits for an object store that does not take its results, and the longest pause between tries."""
STOPPING_SECONDS = 5.0
"""How long an attempt that was asked to stop waits for the database."""
WATCH_SECONDS = 0.25
"""Interval at which the watching thread checks the lease."""
Result = TypeVar("Result")


class LeaseLost(Exception):
    """This attempt does not hold the lease of its row any more. It must stop and write nothing."""


class AskedToStop(Exception):
    """The attempt should end now and give its row back: its worker drains, or its job is paused or overdue."""


class Lease:
    """A context manager that renews the lease of one attempt. `lost` becomes true when the lease is lost.

    `asked_to_stop` says whether the attempt should end for another reason.

    While the database is unreachable, the work goes on for `OUTAGE_SECONDS` after the end of the lease. Other
    workers may not reach it either. If another attempt takes the row meanwhile, the guard on the attempt number
    rejects every write of this one.
    """

    def __init__(
        self,
        database: Database,
        queue: WorkQueue[Any],
        row_id: str,
        attempt: int,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.database, self.queue, self.row_id, self.attempt = database, queue, row_id, attempt
        self.asked_to_stop = asked_to_stop
        self.log = log.bind(**{queue.noun: row_id}, attempt=attempt)
        self._lost = threading.Event()
        self._released = threading.Event()
        self._valid_until = time.monotonic() + self._validity()
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
        self._threads[1].join()  # the other may hang in the database, but it only writes heartbeats

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    def check(self) -> None:
        """Raise `LeaseLost` or `AskedToStop` if the attempt must not go on."""
        if self.lost:
            raise LeaseLost
        if self.asked_to_stop():
            raise AskedToStop

    def wait_lost(self, seconds: float) -> bool:
        """Wait at most `seconds` for the loss of the lease; returns whether it is lost."""
        return self._lost.wait(seconds)

    def write(self, work: Callable[[Session], Result]) -> Result:
        """Run `work` in a transaction. Repeat it while the database is unreachable and the lease is valid.

        An attempt that was asked to stop waits for a few seconds only: its row is taken back after the outage.

        A connection can break after a commit but before its confirmation arrives. `work` may therefore run again after
        it was committed. It must first write to the row that it guards, then detect this. Raises `LeaseLost`.
        """
        return self._insist(self.database.write, work)

    def read(self, work: Callable[[Session], Result]) -> Result:
        """Run `work` in a read-only transaction and repeat it as `write` does. Raises `LeaseLost`."""
        return self._insist(self.database.read, work)

    def _insist(
        self, begin: Callable[[], AbstractContextManager[Session]], work: Callable[[Session], Result]
    ) -> Result:
        began = time.monotonic()
        while True:
            try:
                with begin() as session:
                    return work(session)
            except OperationalError as error:
                self.log.warning("database out of reach", reason=str(error.orig))
                in_vain = self.asked_to_stop() and time.monotonic() - began > STOPPING_SECONDS
                if in_vain or self.wait_lost(1.0):
                    raise LeaseLost from error

    def outlast(self, store: Callable[[], Result]) -> Result:
        """Do `store`, which writes to the object store. Repeat it with growing pauses while the store is away.

        A result has cost much to compute, and is worth a wait of `STORE_PATIENCE_SECONDS`. Raises the error of the
        store after that time, and at once if the attempt should end. Raises `LeaseLost`.
        """
        deadline, pause = time.monotonic() + STORE_PATIENCE_SECONDS, 1.0
        while True:
            try:
                return store()
            except BaseError as error:
                if self.asked_to_stop() or time.monotonic() + pause > deadline:
                    raise
                self.log.warning("object store out of reach", reason=str(error))
                if self.wait_lost(pause):
                    raise LeaseLost from error
                pause = min(2 * pause, MOST_PAUSE_SECONDS)

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` from another thread when the lease is lost."""
        self._callbacks.append(callback)

    def heartbeat(self, session: Session) -> bool:
        """Renew the lease; False if this attempt no longer holds it."""
        return self.queue.heartbeat(session, self.row_id, self.attempt) is not None

    def _validity(self) -> float:
        """Seconds that the work may go on after the last renewal."""
        return self.queue.lease_seconds + work_queue.OUTAGE_SECONDS

    def _renew(self) -> None:
        while not self._released.wait(work_queue.HEARTBEAT_SECONDS):
            sent_at = time.monotonic()
            try:
                with self.database.write() as session:
                    renewed = self.heartbeat(session)
            except Exception as error:  # the database may be unreachable for a while
                self.log.warning("heartbeat failed", reason=str(error))
                continue
            if not renewed:
                self._lost.set()
                return
            self._valid_until = sent_at + self._validity()

    def _watch(self) -> None:
        warned = False
        while not self._released.is_set():
            now = time.monotonic()
            late = now > self._valid_until - work_queue.OUTAGE_SECONDS
            if late and not warned:
                self.log.warning("lease not renewed in time; going on")
            warned = late
            if now > self._valid_until:
                self._lost.set()
            if self._lost.wait(WATCH_SECONDS):
                for callback in self._callbacks:
                    callback()
                return


class JobLease(Lease):
    """The lease of a job. Its heartbeats add up the job's running time and notice that the job was paused."""

    def __init__(
        self, database: Database, job_id: str, attempt: int, asked_to_stop: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__(database, JOBS, job_id, attempt, asked_to_stop)
        self._paused = threading.Event()
        self.counts = True
        """Whether the time counts as running time. That in which a job waits for machines does not."""

    @property
    def paused(self) -> bool:
        """Whether the job was paused during this attempt."""
        return self._paused.is_set()

    def heartbeat(self, session: Session) -> bool:
        row = job_queue.heartbeat(session, self.row_id, self.attempt, counts=self.counts)
        if row is not None and row.paused:
            self._paused.set()
        return row is not None
