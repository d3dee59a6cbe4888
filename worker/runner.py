"""GPU lane: run the trainer of one job in its own process, write its events and upload its results.

    claim the lease → prepare a folder → start the trainer → relay its events → upload → finish

The attempt number guards every write. A lease is lost when its job is cancelled or another worker takes it. The
trainer's whole process group is then killed, and nothing more is written.
"""

import math
import queue
import re
import signal
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import structlog
from sqlalchemy.orm import Session

from app import counted_objects
from app.database import database_now, new_id
from app.estimates import fit
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
from app.spec.labelling import LabellingSpec
from app.stored_content import sha256_of
from worker.base_models import BaseModels
from worker.device import Device
from worker.device_health import DeviceHealth
from worker.hub import ModelUnavailable
from worker.input_file import InputLost, fetch_input
from worker.lease import AskedToStop, JobLease, LeaseLost
from worker.machine import memory_kills, peak_memory
from worker.model_folder import ModelGone, ModelStack, fetch_model, find_model
from worker.outage import fault
from worker.processes import CannotStart, Child, ForkServer, answer_cache
from worker.trainer.errors import STOPPED
from worker.trainer.events import (
    Broken,
    CacheMade,
    CacheWanted,
    DeviceFailed,
    EvaluationDone,
    Event,
    Failed,
    LabellingDone,
    Notice,
    TrainingDone,
    Working,
    read,
)
from worker.trainer_log import LogCopy
from worker.waiting import briefly, in_thread
from worker.work import work_folder

log = structlog.get_logger(__name__)
Result = TypeVar("Result")
Spec = TypeVar("Spec", JobSpec, EvaluationSpec, LabellingSpec)
Done = TrainingDone | EvaluationDone | LabellingDone
"""The events that end a run well."""
Outcome = Done | Failed | Broken | DeviceFailed
"""The events that end a run."""

CACHE_KEY = re.compile(r"(tokens|reference)(/[0-9a-f]{64}){1,2}")
LOG_SECONDS = 3.0
"""Interval at which the trainer's log is uploaded."""
LAST_LOG_SECONDS, TIDY_SECONDS = 2.0, 5.0
"""The longest waits, at the end of an attempt, for the last upload of its log and for the removal of objects."""
WRONG_NUMBERS = {"loss_not_finite", "not_finite", "unsupported_model", "trainer_error"}
"""Codes of errors that a device which computes wrongly causes too. It is checked before a job fails with one."""
DRAIN_SECONDS = 14.0
"""Time for a last checkpoint after the worker was told to stop. Its whole end takes less than 20 seconds."""
TIMEOUT_GRACE_SECONDS = 30.0
"""Time for a last checkpoint after a job has reached its timeout."""


class CannotRun(Exception):
    """A job cannot be run, because a file or model that it names does not exist or cannot be served here."""

    def __init__(self, code: str, message: str, param: str | None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class JobAttempt(ABC, Generic[Spec]):
    """One attempt at one job."""

    def __init__(
        self,
        services: Services,
        base_models: BaseModels,
        job: Job,
        stopping: threading.Event,
        server: ForkServer,
        health: DeviceHealth,
        devices: Sequence[Device] | None = None,
    ) -> None:
        """`devices` are those that it may use; by default the first one of `health`."""
        self.services, self.base_models, self.job, self.stopping = services, base_models, job, stopping
        self.server, self.health = server, health
        self.devices = devices or health.devices[:1]
        self.prefix = f"jobs/{job.id}/attempt-{job.attempt}"
        self.spec: Spec = self.read_spec(job)
        self.bases = dict[str, str]()
        """The names of the base models, by their place in the trainer's folder."""
        self.outcome: Outcome | None = None
        self.began, self.memory_kills = time.monotonic(), memory_kills()
        self._seen = self.began
        """When the last event was relayed."""
        self.log = log.bind(job=job.id, attempt=job.attempt, request=job.request_id)

    def run(self) -> None:
        """Run the attempt to its end and write its result, error or pause."""
        folder = tempfile.TemporaryDirectory(dir=work_folder(self.services), ignore_cleanup_errors=True)
        job, database = self.job, self.services.database
        with folder as name, JobLease(database, job.id, job.attempt, lambda: self.asked_to_stop) as self.lease:
            self.folder = Path(name)
            try:
                in_thread(self.prepare, self.lease.check)
                self.work()
            except AskedToStop:
                with suppress(LeaseLost):
                    self.stop_early()
            except CannotRun as error:
                with suppress(LeaseLost):
                    self.fail(error.code, str(error), error.param)
            except LeaseLost:
                self.log.warning("lease lost; the trainer was stopped")
            except Exception as error:  # without this, the job would hang until its lease expires
                self.log.error("the attempt failed", exc_info=error)
                reason = fault(error)
                if reason is not None:
                    self._set_back(reason)
                else:
                    self._recover(f"The worker failed ({type(error).__name__}).")
            finally:
                self.close()
        if not self.stopping.is_set():
            briefly(partial(tidy_job, self.services, self.job.id), TIDY_SECONDS)  # pruning removes what is left

    def work(self) -> None:
        """Do the work of the attempt, and end it."""
        self.run_trainer()

    def run_trainer(self) -> None:
        """Run the trainer over the folder, and end the attempt as its outcome demands."""
        self.outcome = None
        self._finish(self._train())

    @property
    def overdue(self) -> bool:
        """Whether the job has reached its timeout, all attempts together."""
        limit = self.job.timeout_seconds
        return limit is not None and self.job.ran_seconds + time.monotonic() - self.began > limit

    # -- implemented by each kind of job ------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def read_spec(job: Job) -> Spec:
        """The spec of the job."""

    @abstractmethod
    def timeout_hint(self) -> str:
        """Advice for the user, at the end of the error message of a timeout."""

    @abstractmethod
    def prepare(self) -> None:
        """Fill the trainer's folder. Raises `CannotRun`."""

    @abstractmethod
    def before_write(self, event: Event) -> None:
        """Upload the files that `event` reports. Called before the event is written to the database."""

    @abstractmethod
    def columns(self, batch: list[Event]) -> dict[str, object]:
        """The columns of the job's row that `batch` changes."""

    @abstractmethod
    def write_event(self, session: Session, event_id: str, event: Event) -> None:
        """Write the rows for `event`. Notices are written by the caller."""

    def after_write(self, batch: list[Event]) -> None:
        """Called after `batch` is written."""

    @abstractmethod
    def succeed(self, outcome: Done) -> None:
        """Upload the results, then make them visible in one transaction."""

    def close(self) -> None:
        """Called at the end of every attempt."""

    # -- before ------------------------------------------------------------------------------------------------

    def fetch_model(self, name: str, folder: Path, field: str) -> tuple[ModelStack, str | None]:
        """Put the weights of the model `name` into `folder`. Returns (model stack, hub revision of its base model).

        Raises `CannotRun`, which names `field` of the spec.
        """
        try:
            stack = self.lease.read(lambda session: find_model(session, self.job.project, name))
            self.bases[(folder / "base").relative_to(self.folder).as_posix()] = stack.model.base_model
            return stack, fetch_model(self.services.storage, self.base_models, stack, folder, self.lease.check)
        except ModelGone as error:
            raise CannotRun("model_not_found", str(error), field) from error
        except ModelUnavailable as error:
            raise CannotRun("model_unavailable", str(error), field) from error

    def fetch_file(self, file_id: str, path: Path, field: str) -> None:
        """Download an input file of the job to `path`. Raises `CannotRun`, which names `field` of the spec."""
        file = self.lease.read(lambda session: session.get(File, file_id))
        try:
            fetch_input(self.services.storage, file, file_id, path)
        except InputLost as error:
            raise CannotRun("file_not_found", str(error), field) from error

    # -- during ------------------------------------------------------------------------------------------------

    def _train(self) -> int:
        """Run the trainer; returns its exit status."""
        if self.lease.lost:
            raise LeaseLost
        try:
            process = self.server.start(self.folder, self.lease.check)
        except CannotStart as error:
            self.outcome = DeviceFailed(str(error))
            return 1
        self.log.info("trainer started", pid=process.pid)
        # The callback runs in another thread: a trainer without a lease must end even if this thread is busy.
        self.lease.on_lost(process.kill)
        lines: queue.Queue[bytes | None] = queue.Queue()
        reader = threading.Thread(target=_read_lines, args=(process, lines), daemon=True)
        reader.start()
        log_copy = LogCopy(self.services.storage, log_key(self.job.id, self.job.attempt), self.folder / "trainer.log")
        try:
            self._relay_until_end(process, lines, log_copy)
            return process.wait()
        finally:
            process.kill()
            briefly(partial(self._end_log, log_copy), LAST_LOG_SECONDS)

    def _end_log(self, log_copy: LogCopy) -> None:
        """Upload the log to its end, and count it as stored."""
        log_copy.finish(LAST_LOG_SECONDS)
        with self.services.database.write() as session:
            counted_objects.note(session, self.job.project, log_copy.key, log_copy.path.stat().st_size)

    def _relay_until_end(self, process: Child, lines: "queue.Queue[bytes | None]", log_copy: LogCopy) -> None:
        """Relay the trainer's events until it closes its output. Stop it when the attempt should end."""
        stop_sent_at, uploaded_at = math.inf, time.monotonic()

        def pass_on_requests() -> None:
            nonlocal stop_sent_at
            if self.lease.lost:
                raise LeaseLost
            if stop_sent_at == math.inf and self.asked_to_stop:
                process.send_signal(signal.SIGTERM)
                stop_sent_at = time.monotonic()
            if self.overdue and time.monotonic() - stop_sent_at > TIMEOUT_GRACE_SECONDS:
                process.kill()
            if self.stopping.is_set() and time.monotonic() - stop_sent_at > DRAIN_SECONDS:
                raise AskedToStop  # the object store hangs, or the last checkpoint takes too long

        while True:
            batch, ended = _drain(lines)
            pass_on_requests()
            if batch:  # it may upload a checkpoint of many gigabytes
                in_thread(partial(self._serve_cache, process, batch), pass_on_requests)
                in_thread(partial(self._relay, batch), pass_on_requests)
            if ended:
                return
            if time.monotonic() - uploaded_at > LOG_SECONDS:
                log_copy.renew()
                uploaded_at = time.monotonic()

    def _serve_cache(self, process: Child, batch: list[Event]) -> None:
        """Fetch and store cache files for the trainer. A failure of the cache costs only time."""
        for event in batch:
            match event:
                case CacheMade(key):
                    put = partial(counted_objects.put, self.services.storage, self.services.database, self.job.project)
                    self._share(key, put)
                case CacheWanted(key):
                    if not self._share(key, self.services.storage.get_file):
                        (self.folder / "cache" / key).unlink(missing_ok=True)  # it may be incomplete
                    answer_cache(process.stdin, key)

    def _share(self, key: str, copy: Callable[[str, Path], None]) -> bool:
        """Copy the cache file `key` from or to the object store with `copy`; returns whether that worked."""
        if not CACHE_KEY.fullmatch(key):
            raise ValueError(f"not a cache key: {key}")
        try:
            shared = self.services.settings.share_cache
            copy(counted_objects.key_of(self.job.project, key, shared=shared), self.folder / "cache" / key)
        except FileNotFoundError:
            return False
        except Exception as error:
            self.log.warning("the cache is out of reach", key=key, reason=str(error))
            return False
        return True

    def _count_time(self, batch: list[Event]) -> None:
        """Count the time as running time, unless the job waits for machines of a cluster."""
        for event in batch:
            now, waits = time.monotonic(), isinstance(event, Working) and event.activity == "placing"
            if not self.lease.counts:
                self.began += now - self._seen
            self.lease.counts, self._seen = not waits, now

    def _relay(self, batch: list[Event]) -> None:
        """Write a batch of the trainer's events. Files are uploaded first, so that no row refers to a missing file."""
        self._count_time(batch)
        for event in batch:
            self.before_write(event)
            if isinstance(event, Outcome):
                self.outcome = event
        event_ids = [new_id("ftevent") for _ in batch]

        def write(session: Session) -> None:
            if not JOBS.write(session, self.job.id, self.job.attempt, **self.columns(batch)):
                raise LeaseLost
            if job_events.any_of(session, event_ids):  # an earlier try was committed
                return
            for event_id, event in zip(event_ids, batch, strict=True):
                if isinstance(event, Notice):
                    level, data = event.level, event.data
                    job_events.add(session, self.job.id, event.message, level=level, data=data, id=event_id)
                else:
                    self.write_event(session, event_id, event)

        self.lease.write(write)
        self.after_write(batch)

    # -- after -------------------------------------------------------------------------------------------------

    def _finish(self, status: int) -> None:
        match self.outcome:
            case TrainingDone() | EvaluationDone() | LabellingDone() if status == 0:
                self.health.worked()
                self.succeed(self.outcome)
            case Failed(code, message, _) if code in WRONG_NUMBERS and self.health.at_fault(message, self.devices):
                self._hand_back()
            case Failed("out_of_memory", message, _) if self.has_larger_device():
                self._wait_for_larger_device(message)
            case Failed(code, message, param):
                self.fail(code, message, param)
            case _ if (self.overdue or status == STOPPED) and self.asked_to_stop:
                self.stop_early()
            case Broken(reason, is_lost):
                give_back = self._recover if is_lost else self._set_back
                give_back(f"The trainer could not go on ({reason}).")
            case DeviceFailed(reason):
                self._leave_device(reason)
            case _:
                cause = f"signal {-status}" if status < 0 else f"exit status {status}"
                if status == -signal.SIGKILL and memory_kills() > self.memory_kills:
                    self._killed_for_memory()
                elif status == -signal.SIGKILL:
                    self._recover(f"The trainer died ({cause}).")
                else:  # a GPU that breaks also ends its process
                    self._leave_device(f"the trainer died, {cause}")

    def _killed_for_memory(self) -> None:
        """Count this attempt as lost, because the kernel killed the trainer when the worker's memory ran out."""
        used = peak_memory()
        peak = "" if used is None else f" It used up to {used[0] / 1e9:.1f} of {used[1] / 1e9:.1f} GB."
        reason = f"The trainer was killed because this worker ran out of memory.{peak}"
        self.log.warning("attempt lost", reason=reason)
        self._give_back(partial(transitions.recover, loss=transitions.KILLED_FOR_MEMORY), reason)

    def has_larger_device(self) -> bool:
        """Whether another worker that serves the job's base model has a device with more memory than this one."""
        largest = self.lease.read(lambda session: fit.largest(fit.devices_of(session, self.job.base_model)))
        return largest is not None and largest.memory_bytes > self.smallest_device.memory_bytes

    @property
    def smallest_device(self) -> Device:
        """The one of its devices that has the least memory."""
        return min(self.devices, key=lambda device: device.memory_bytes)

    def _wait_for_larger_device(self, reason: str) -> None:
        """Give back a job that was started by a device too small for it. From now on it waits for a larger one."""
        message = f"{reason} The job waits for a device with more memory than the {self.smallest_device.name} has."
        memory_bytes = self.smallest_device.memory_bytes + 1
        self.lease.write(
            lambda session: self.end(session, Status.QUEUED, message, level="warn", memory_bytes=memory_bytes)
        )

    def _leave_device(self, reason: str) -> None:
        """Let another worker continue the job if the device is at fault. The attempt then does not count as lost."""
        if self.health.failed(reason, self.devices):
            self._hand_back()
        else:
            self._recover(f"The trainer could not go on ({reason}).")

    def _hand_back(self) -> None:
        """Give the job back because the device is out of service."""
        message = f"The device of this worker is out of service ({self.health.problem}). The job will resume elsewhere."
        self.lease.write(lambda session: self.end(session, Status.QUEUED, message, level="warn"))

    @property
    def asked_to_stop(self) -> bool:
        """Whether the attempt should end now: after a timeout, because of a pause, or because the worker stops."""
        return self.overdue or self.lease.paused or self.stopping.is_set()

    def stop_early(self) -> None:
        """End an attempt that was asked to stop. The job fails after a timeout, else it goes back to the queue."""
        if self.overdue:
            message = f"The job reached its 'timeout_seconds' of {self.job.timeout_seconds} s. {self.timeout_hint()}"
            self.fail("timeout_exceeded", message, "timeout_seconds")
            return
        paused, drained = "The job is paused. Its GPU is free.", "The worker stops; the job will resume."
        text = paused if self.lease.paused else drained
        self.lease.write(lambda session: self.end(session, Status.QUEUED, text))

    def store(self, work: Callable[[], Result]) -> Result:
        """Do `work`, which writes a result to the object store. Waits for a store that is away while it is wanted.

        Raises what `Lease.outlast` and `Lease.check` raise.
        """
        return in_thread(partial(self.lease.outlast, work), self.lease.check)

    def store_result(self, path: Path, name: str, purpose: str = "fine-tune-results") -> Callable[[], File]:
        """Upload a result file of the job. Returns what makes its row, which the caller adds in a transaction."""
        file_id, size, sha256 = new_id("file"), path.stat().st_size, sha256_of(path)
        self.store(partial(self.services.storage.put_file, f"files/{file_id}", path))
        return lambda: File(
            id=file_id,
            project=self.job.project,
            filename=name,
            purpose=purpose,
            bytes=size,
            sha256=sha256,
            created_at=database_now(),
        )

    def fail(self, code: str, message: str, param: str | None) -> bool:
        """End the job as failed; always returns False. Raises `LeaseLost`."""
        error = {"code": code, "message": message, "param": param}
        self.lease.write(lambda session: self.end(session, Status.FAILED, message, level="error", error=error))
        return False

    def end(self, session: Session, target: Status, message: str, *, level: str = "info", **values: object) -> None:
        """Take the running job to the status `target` and write the columns `values`. Raises `LeaseLost`."""
        is_done = transitions.transition(
            session,
            self.job.id,
            Status.RUNNING,
            target,
            actor=Actor.RUNNER,
            attempt=self.job.attempt,
            message=message,
            level=level,
            **values,
        )
        if not is_done:
            raise LeaseLost

    def _recover(self, reason: str) -> None:
        """Count this attempt as lost and let another one continue the job."""
        self.log.warning("attempt lost", reason=reason)
        self._give_back(transitions.recover, reason)

    def _set_back(self, reason: str) -> None:
        """Let another attempt continue the job. This one does not count as lost: the service is at fault."""
        self.log.warning("attempt set back", reason=reason)
        self._give_back(transitions.set_back, reason)

    def _give_back(self, how: Callable[[Session, Job, Actor, str], None], reason: str) -> None:
        def write(session: Session) -> None:
            current = session.get_one(Job, self.job.id)
            if current.attempt == self.job.attempt and current.status == Status.RUNNING:
                how(session, current, Actor.RUNNER, reason)

        with suppress(LeaseLost):
            self.lease.write(write)


def _read_lines(process: Child, lines: "queue.Queue[bytes | None]") -> None:
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _drain(lines: "queue.Queue[bytes | None]") -> tuple[list[Event], bool]:
    """(events that have arrived, whether the trainer closed its output). Waits a moment for the first event."""
    batch: list[Event] = []
    with suppress(queue.Empty):
        line = lines.get(timeout=0.25)
        while True:
            if line is None:
                return batch, True
            batch.append(read(line))
            line = lines.get_nowait()
    return batch, False
