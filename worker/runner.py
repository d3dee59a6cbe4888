"""GPU lane: run the trainer of one job in a process of its own, and bring what it makes to safety.

    claim the lease → prepare a folder → spawn the trainer → relay its events → upload → finish

Every write is guarded by the attempt. Where the lease is lost (cancelled, or given to another worker) the
trainer's whole process group is killed and nothing more is written.
"""

import math
import queue
import re
import signal
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import structlog
from sqlalchemy.orm import Session

from app.database import database_now, new_id
from app.files.tables import File
from app.jobs import events as job_events
from app.jobs import transitions
from app.jobs.lifecycle import log_key
from app.jobs.queue import JOBS
from app.jobs.states import Actor, Status
from app.jobs.tables import Job
from app.prune import tidy_job
from app.services import Services
from app.spec.evaluation import EvaluationSpec
from app.spec.job import JobSpec
from worker.base_models import BaseModels, ModelUnavailable
from worker.lease import JobLease, LeaseLost
from worker.model_folder import FoundModel, ModelGone, fetch_model, find_model
from worker.processes import ForkServer, Trainer, answer_cache
from worker.trainer.events import (
    Broken,
    CacheMade,
    CacheWanted,
    EvaluationDone,
    Event,
    Failed,
    Notice,
    TrainingDone,
    read,
)
from worker.work import work_folder

log = structlog.get_logger(__name__)
Spec = TypeVar("Spec", JobSpec, EvaluationSpec)
Outcome = TrainingDone | EvaluationDone | Failed | Broken

STOPPED = 75
CACHE_KEY = re.compile(r"(tokens|reference)(/[0-9a-f]{64}){1,2}")
LOG_SECONDS = 3.0
OVERDUE_SECONDS = 30.0
"""For the checkpoint of a job whose time is over."""


class Unfit(Exception):
    """A job that cannot be run: something that it names is gone, or not on this machine."""

    def __init__(self, code: str, message: str, param: str | None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class Attempt(ABC, Generic[Spec]):
    """One attempt at one job."""

    OVERDUE: ClassVar[str]
    """What is said to the user where the job's time is over, besides that it is."""

    def __init__(
        self, services: Services, base_models: BaseModels, job: Job, stopping: threading.Event, server: ForkServer
    ) -> None:
        self.services, self.base_models, self.job, self.stopping = services, base_models, job, stopping
        self.server = server
        self.prefix = f"jobs/{job.id}/attempt-{job.attempt}"
        self.spec: Spec = self.read_spec(job)
        self.outcome: Outcome | None = None
        self.began = time.monotonic()
        self.log = log.bind(job=job.id, attempt=job.attempt, request=job.request_id)

    def run(self) -> None:
        """Run the attempt to its end, whatever that is."""
        folder = tempfile.TemporaryDirectory(dir=work_folder(self.services), ignore_cleanup_errors=True)
        with folder as name, JobLease(self.services.database, self.job.id, self.job.attempt) as self.lease:
            self.folder = Path(name)
            try:
                self.prepare()
                self._finish(self._train())
            except Unfit as error:
                with suppress(LeaseLost):
                    self.fail(error.code, str(error), error.param)
            except LeaseLost:
                self.log.warning("lease lost; the trainer was stopped")
            except Exception as error:  # the store, the disk: the job must not hang until its lease expires
                self.log.error("the attempt failed", exc_info=error)
                self._recover(f"The worker failed ({type(error).__name__}).")
            finally:
                self.close()
        with suppress(Exception):  # pruning will find it
            tidy_job(self.services, self.job.id)

    @property
    def overdue(self) -> bool:
        """Whether the job has trained for longer than it may."""
        limit = self.job.timeout_seconds
        return limit is not None and self.job.ran_seconds + time.monotonic() - self.began > limit

    # -- what a training and an evaluation do each in their own way -------------------------------------------------

    @staticmethod
    @abstractmethod
    def read_spec(job: Job) -> Spec:
        """What the job asks for."""

    @abstractmethod
    def prepare(self) -> None:
        """Lay out the trainer's folder. Raises `Unfit` for a job that cannot be run."""

    @abstractmethod
    def bring(self, event: Event) -> None:
        """Bring to safety what `event` tells of, before its row is written."""

    @abstractmethod
    def columns(self, batch: list[Event]) -> dict[str, Any]:
        """The job's columns after `batch`."""

    @abstractmethod
    def write_event(self, session: Session, event_id: str, event: Event) -> None:
        """Write what `event` tells, other than messages."""

    def relayed(self, batch: list[Event]) -> None:
        """Called once `batch` is written."""

    @abstractmethod
    def succeed(self, outcome: TrainingDone | EvaluationDone) -> None:
        """Upload what was made, then make it visible in one transaction."""

    def close(self) -> None:
        """Called at the end of the attempt, whatever it is."""

    # -- before ------------------------------------------------------------------------------------------------

    def fetch_model(self, name: str, folder: Path, field: str) -> tuple[FoundModel, str | None]:
        """Put what the model `name` is made of into `folder`; returns what it is, and the hub revision of its base.

        Raises `Unfit`, about `field` of the spec.
        """
        try:
            found = self.lease.read(lambda session: find_model(session, self.job.project, name))
            return found, fetch_model(self.services.storage, self.base_models, found, folder)
        except ModelGone as error:
            raise Unfit("model_not_found", str(error), field) from error
        except ModelUnavailable as error:
            raise Unfit("model_unavailable", str(error), field) from error

    def fetch_file(self, file_id: str, place: Path, field: str) -> None:
        """Put a file that the job reads at `place`. Raises `Unfit`."""
        try:
            self.services.storage.get_file(f"files/{file_id}", place)
        except FileNotFoundError as error:
            raise Unfit("file_not_found", f"A file of the job is gone: {error}", field) from error

    # -- during ------------------------------------------------------------------------------------------------

    def _train(self) -> int:
        """Run the trainer; returns its exit status."""
        if self.lease.lost:
            raise LeaseLost
        process = self.server.start(self.folder)
        self.log.info("trainer started", pid=process.pid)
        # Whatever this thread is busy with then: a trainer without a lease ends at once.
        self.lease.on_lost(process.kill)
        lines: queue.Queue[bytes | None] = queue.Queue()
        reader = threading.Thread(target=_read_lines, args=(process, lines), daemon=True)
        reader.start()
        try:
            self._relay_until_end(process, lines)
            return process.wait()
        finally:
            process.kill()
            self._upload_log()

    def _relay_until_end(self, process: Trainer, lines: "queue.Queue[bytes | None]") -> None:
        asked, uploaded = math.inf, time.monotonic()
        while True:
            batch, ended = _drain(lines)
            if self.lease.lost:
                raise LeaseLost
            if asked == math.inf and self.asked_to_stop:
                process.send_signal(signal.SIGTERM)
                asked = time.monotonic()
            if self.overdue and time.monotonic() - asked > OVERDUE_SECONDS:
                process.kill()
            if batch:
                self._serve_cache(process, batch)
                self._relay(batch)
            if ended:
                return
            if time.monotonic() - uploaded > LOG_SECONDS:
                self._upload_log()
                uploaded = time.monotonic()

    def _serve_cache(self, process: Trainer, batch: list[Event]) -> None:
        """Fetch what the trainer wants and others made, and store what it made. A cache that fails is only slower."""
        for event in batch:
            match event:
                case CacheMade(key):
                    self._share(key, self.services.storage.put_file)
                case CacheWanted(key):
                    if not self._share(key, self.services.storage.get_file):
                        (self.folder / "cache" / key).unlink(missing_ok=True)  # half of it may be there
                    answer_cache(process.stdin, key)

    def _share(self, key: str, copy: Callable[[str, Path], None]) -> bool:
        """Copy what the cache has under `key` from or to the object store; whether that worked."""
        if not CACHE_KEY.fullmatch(key):
            raise ValueError(f"not a key of the cache: {key}")
        try:
            copy(f"cache/{key}", self.folder / "cache" / key)
        except FileNotFoundError:
            return False
        except Exception as error:
            self.log.warning("the cache is out of reach", key=key, reason=str(error))
            return False
        return True

    def _relay(self, batch: list[Event]) -> None:
        """Write a batch of the trainer's events: what they tell of is uploaded first, so that their rows are true."""
        for event in batch:
            self.bring(event)
            if isinstance(event, Outcome):
                self.outcome = event
        told = [new_id("ftevent") for _ in batch]

        def write(session: Session) -> None:
            if not JOBS.write(session, self.job.id, self.job.attempt, **self.columns(batch)):
                raise LeaseLost
            if job_events.any_of(session, told):  # the commit was done, and only its answer was lost
                return
            for event_id, event in zip(told, batch, strict=True):
                if isinstance(event, Notice):
                    level, data = event.level, event.data
                    job_events.add(session, self.job.id, event.message, level=level, data=data, id=event_id)
                else:
                    self.write_event(session, event_id, event)

        self.lease.write(write)
        self.relayed(batch)

    def _upload_log(self) -> None:
        path = self.folder / "trainer.log"
        with suppress(Exception):  # a log that cannot be stored must not stop a training
            self.services.storage.put_file(log_key(self.job.id, self.job.attempt), path)

    # -- after -------------------------------------------------------------------------------------------------

    def _finish(self, status: int) -> None:
        match self.outcome:
            case TrainingDone() | EvaluationDone() if status == 0:
                self.succeed(self.outcome)
            case Failed(code, message, param):
                self.fail(code, message, param)
            case _ if (self.overdue or status == STOPPED) and self.asked_to_stop:
                self.give_back()
            case Broken(reason):
                self._recover(f"The trainer could not go on ({reason}).")
            case _:
                how = f"signal {-status}" if status < 0 else f"exit status {status}"
                self._recover(f"The trainer died ({how}).")

    @property
    def asked_to_stop(self) -> bool:
        """Whether the attempt should end before the job has."""
        return self.overdue or self.lease.paused or self.stopping.is_set()

    def give_back(self) -> None:
        """End an attempt that was asked to stop: its job fails where its time is over, else goes back to the queue."""
        if self.overdue:
            message = f"It ran for {self.job.timeout_seconds} s, which is its 'timeout_seconds'. {self.OVERDUE}"
            self.fail("timeout_exceeded", message, "timeout_seconds")
            return
        paused, stops = "The job waits, paused; its GPU is free.", "The worker stops; the job will resume."
        text = paused if self.lease.paused else stops
        self.lease.write(lambda session: self.end(session, Status.QUEUED, text))

    def result_file(self, file_id: str, path: Path, name: str) -> File:
        """The row of a file that the job leaves."""
        return File(
            id=file_id,
            project=self.job.project,
            filename=name,
            purpose="fine-tune-results",
            bytes=path.stat().st_size,
            sha256="",
            created_at=database_now(),
        )

    def fail(self, code: str, message: str, param: str | None) -> bool:
        error = {"code": code, "message": message, "param": param}
        self.lease.write(lambda session: self.end(session, Status.FAILED, message, level="error", error=error))
        return False

    def end(self, session: Session, target: Status, message: str, **values: Any) -> None:
        taken = transitions.transition(
            session,
            self.job.id,
            Status.RUNNING,
            target,
            actor=Actor.RUNNER,
            attempt=self.job.attempt,
            message=message,
            **values,
        )
        if not taken:
            raise LeaseLost

    def _recover(self, reason: str) -> None:
        self.log.warning("attempt lost", reason=reason)

        def write(session: Session) -> None:
            current = session.get_one(Job, self.job.id)
            if current.attempt == self.job.attempt and current.status == Status.RUNNING:
                transitions.recover(session, current, Actor.RUNNER, reason)

        with suppress(LeaseLost):
            self.lease.write(write)


def _read_lines(process: Trainer, lines: "queue.Queue[bytes | None]") -> None:
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _drain(lines: "queue.Queue[bytes | None]") -> tuple[list[Event], bool]:
    """(events that came within a moment, whether the trainer closed its output)."""
    batch: list[Event] = []
    with suppress(queue.Empty):
        line = lines.get(timeout=0.25)
        while True:
            if line is None:
                return batch, True
            batch.append(read(line))
            line = lines.get_nowait()
    return batch, False
