"""GPU lane: run the trainer of one job in a process of its own, and bring what it makes to safety.

    claim the lease → prepare a folder → spawn the trainer → relay its events → upload → finish

Every write is guarded by the attempt. Where the lease is lost (cancelled, or given to another worker) the
trainer's whole process group is killed and nothing more is written.
"""

import json
import math
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.orm import Session

from app.database import database_now, new_id
from app.files.tables import File
from app.jobs import gates, repository
from app.jobs.service import log_key
from app.jobs.spec import JobSpec
from app.jobs.states import Actor, Status
from app.jobs.tables import Checkpoint, Job
from app.models import repository as models
from app.models.tables import Model
from app.services import Services
from app.sweep import tidy_job
from worker.base_models import BaseModels, ModelUnavailable
from worker.checkpoints import Checkpoints
from worker.integrations import Reporter
from worker.lease import Lease, LeaseLost
from worker.processes import Spare, kill_group
from worker.work import work_folder

log = structlog.get_logger(__name__)

STOPPED = 75
CACHE_KEY = re.compile(r"(tokens|reference)(/[0-9a-f]{64}){1,2}")
LOG_SECONDS = 3.0
OVERDUE_SECONDS = 30.0
"""For the checkpoint of a job whose time is over."""


def model_name(job: Job) -> str:
    """`ft:{base}:{project}:{suffix}:{8 characters of the job's id}`"""
    return f"ft:{job.base_model}:{job.project}:{job.spec['suffix'] or ''}:{job.id.removeprefix('ftjob-')[:8].lower()}"


class Run:
    """One attempt at one job."""

    def __init__(
        self, services: Services, base_models: BaseModels, job: Job, stopping: threading.Event, spare: Spare
    ) -> None:
        self.services, self.base_models, self.job, self.stopping = services, base_models, job, stopping
        self.spare = spare
        self.prefix = f"jobs/{job.id}/attempt-{job.attempt}"
        self.spec = JobSpec.stored(job.spec)
        self.outcome: dict[str, Any] | None = None
        self.began = time.monotonic()
        self.log = log.bind(job=job.id, attempt=job.attempt, request=job.request_id)

    def run(self) -> None:
        """Run the attempt to its end, whatever that is."""
        folder = tempfile.TemporaryDirectory(dir=work_folder(self.services), ignore_cleanup_errors=True)
        with folder as name, Lease(self.services.database, self.job.id, self.job.attempt) as self.lease:
            self.folder = Path(name)
            self.checkpoints = Checkpoints(self.services.storage, self.lease, self.job)
            self.reporter = Reporter(self.job.id, self.spec, self.folder)
            try:
                if self._prepare():
                    self._finish(self._train())
            except LeaseLost:
                self.log.warning("lease lost; the trainer was stopped")
            except Exception as error:  # the store, the disk: the job must not hang until its lease expires
                self.log.error("the attempt failed", exc_info=error)
                self._recover(f"The worker failed ({type(error).__name__}).")
            finally:
                self.reporter.close()
        with suppress(Exception):  # a sweep will find it
            tidy_job(self.services, self.job.id)

    @property
    def overdue(self) -> bool:
        """Whether the job has trained for longer than it may."""
        limit = self.job.timeout_seconds
        return limit is not None and self.job.ran_seconds + time.monotonic() - self.began > limit

    # -- before ------------------------------------------------------------------------------------------------

    def _prepare(self) -> bool:
        """Lay out the trainer's folder; False where the job was failed instead."""
        spec = self.spec
        named = dict(spec.files())
        paths = {file_id: f"data/{file_id}" for file_id in named.values()}
        reference = spec.reference_model
        try:
            base, revision = self.base_models.locate(self.job.base_model)
            for file_id, path in paths.items():
                self.services.storage.get_file(f"files/{file_id}", self.folder / path)
        except ModelUnavailable as error:
            return self._fail("model_unavailable", str(error), "model")
        except FileNotFoundError as error:
            return self._fail("file_not_found", f"A file of the job is gone: {error}", "training_file")

        def look(session: Session) -> tuple[models.Found | None, models.Found | None, models.Found | None, str | None]:
            of = self.job.project
            return (
                models.find(session, of, spec.model),
                models.find(session, of, self.job.foundation) if self.job.foundation else None,
                models.find(session, of, reference) if reference else None,
                models.version(session, self.job.base_model),
            )

        def look_below(session: Session) -> models.Found | None:
            below = held_to.foundation if held_to else None
            return models.find(session, self.job.project, below) if below else None

        started_from, foundation, held_to, version = self.lease.read(look)
        held_to_foundation = self.lease.read(look_below)
        if started_from is None:
            return self._fail("model_not_found", f"The model '{spec.model}' was deleted.", "model")
        if self.job.foundation and not foundation:
            return self._fail("model_not_found", f"The model '{self.job.foundation}' was deleted.", "model")
        self._place(started_from, foundation or None, base, self.folder)
        if reference:
            field = "method.dpo.hyperparameters.reference_model"
            if not held_to:
                return self._fail("model_not_found", f"The model '{reference}' was deleted.", field)
            try:
                other, _ = self.base_models.locate(held_to.base_model)
            except ModelUnavailable as error:
                return self._fail("model_unavailable", str(error), field)
            self._place(held_to, held_to_foundation or None, other, self.folder / "reference")
        self.checkpoints.fetch(self.folder / "resume")
        located = spec.with_files({field: paths[file_id] for field, file_id in named.items()})
        (self.folder / "spec.json").write_text(located.model_dump_json())
        name = self.job.foundation or self.job.base_model
        run = {"base_model": name, "revision": revision, "version": version, "spec": self.job.spec}
        run["log"] = {"job": self.job.id, "attempt": self.job.attempt, "request": self.job.request_id}
        (self.folder / "run.json").write_text(json.dumps(run))
        return True

    def _place(self, model: models.Found, foundation: models.Found | None, base: Path, folder: Path) -> None:
        """Put what `model` is made of into `folder`: `base`, and for an adapter `start`."""
        folder.mkdir(exist_ok=True)
        if foundation is not None and foundation.prefix is not None:
            self.services.storage.get_folder(foundation.prefix, folder / "base")
        else:
            (folder / "base").symlink_to(base.resolve(), target_is_directory=True)
        if model.kind == "adapter" and model.prefix is not None:
            self.services.storage.get_folder(model.prefix, folder / "start")

    # -- during ------------------------------------------------------------------------------------------------

    def _train(self) -> int:
        """Run the trainer; returns its exit status."""
        if self.lease.lost:
            raise LeaseLost
        process = self.spare.take(self.folder)
        self.log.info("trainer started", pid=process.pid)
        # Whatever this thread is busy with then: a trainer without a lease ends at once.
        self.lease.on_lost(lambda: kill_group(process))
        lines: queue.Queue[bytes | None] = queue.Queue()
        reader = threading.Thread(target=_read_lines, args=(process, lines), daemon=True)
        reader.start()
        try:
            self._relay_until_end(process, lines)
            return process.wait()
        finally:
            kill_group(process)
            self._upload_log()

    def _relay_until_end(self, process: subprocess.Popen[bytes], lines: "queue.Queue[bytes | None]") -> None:
        asked, uploaded = math.inf, time.monotonic()
        while True:
            batch, ended = _drain(lines)
            if self.lease.lost:
                raise LeaseLost
            if asked == math.inf and (self.stopping.is_set() or self.lease.paused or self.overdue):
                process.send_signal(signal.SIGTERM)
                asked = time.monotonic()
            if self.overdue and time.monotonic() - asked > OVERDUE_SECONDS:
                kill_group(process)
            if batch:
                self._serve_cache(process, batch)
                self._relay(batch)
            if ended:
                return
            if time.monotonic() - uploaded > LOG_SECONDS:
                self._upload_log()
                uploaded = time.monotonic()

    def _serve_cache(self, process: "subprocess.Popen[bytes]", batch: list[dict[str, Any]]) -> None:
        """Fetch what the trainer wants and others made, and store what it made. A cache that fails is only slower."""
        assert process.stdin is not None
        for event in batch:
            if event["kind"] == "made":
                self._share(event["key"], self.services.storage.put_file)
            elif event["kind"] == "wanted":
                if not self._share(event["key"], self.services.storage.get_file):
                    (self.folder / "cache" / event["key"]).unlink(missing_ok=True)  # half of it may be there
                with suppress(BrokenPipeError):
                    process.stdin.write(json.dumps({"key": event["key"]}).encode() + b"\n")
                    process.stdin.flush()

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

    def _relay(self, batch: list[dict[str, Any]]) -> None:
        """Write a batch of the trainer's events: checkpoints are uploaded first, so that their rows are true."""
        for event in batch:
            if event["kind"] == "checkpoint":
                self.checkpoints.store(f"{self.prefix}/{event['path']}", self.folder / event["path"])
            elif event["kind"] == "metrics":
                self.reporter.metrics(event["step"], event["metrics"])
            elif event["kind"] in ("done", "failed", "broken"):
                self.outcome = event

        told = [new_id("ftevent") for _ in batch]

        def write(session: Session) -> None:
            columns = _columns(batch)
            if not repository.write_guarded(session, self.job.id, self.job.attempt, **columns):
                raise LeaseLost
            if repository.any_event(session, told):  # the commit was done, and only its answer was lost
                return
            for event_id, event in zip(told, batch, strict=True):
                self._write_event(session, event_id, event)

        self.lease.write(write)
        if any(event["kind"] == "checkpoint" for event in batch):
            try:
                self.checkpoints.trim()
            except LeaseLost:
                raise
            except Exception as error:  # what is too much can wait; the training cannot
                self.log.warning("checkpoints not trimmed", reason=str(error))

    def _write_event(self, session: Session, event_id: str, event: dict[str, Any]) -> None:
        if event["kind"] == "message":
            repository.add_event(session, self.job.id, event["message"], level=event["level"], id=event_id)
        elif event["kind"] == "stage":
            text = f"Stage {event['stage']}: {event['rows']} rows, {event['validation_rows']} for validation."
            repository.add_event(session, self.job.id, text, id=event_id)
        elif event["kind"] == "metrics":
            shown = ("loss", "eval/loss", "rewards/accuracies", "eval/rewards/accuracies", "eval/rewards/margins")
            values = ", ".join(f"{n}={event['metrics'][n]:.4f}" for n in shown if n in event["metrics"])
            data = {"step": event["step"], "stage": event["stage"], "total_steps": event["total_steps"]}
            data |= event["metrics"] | {"train_loss": event["metrics"].get("loss")}
            message = f"Step {event['step']}/{event['total_steps']}: {values}"
            repository.add_event(session, self.job.id, message, type="metrics", data=data, id=event_id)
        elif event["kind"] == "checkpoint":
            name = f"{model_name(self.job)}:ckpt-step-{event['step']}"
            prefix = f"{self.prefix}/{event['path']}"
            if repository.move_checkpoint(session, self.job.id, event["step"], prefix):
                return  # written again after a resume: the same bytes, and whole, which the first may not be
            session.add(
                Checkpoint(
                    id=new_id("ftckpt"),
                    job_id=self.job.id,
                    created_at=database_now(),
                    stage=event["stage"],
                    step_number=event["step"],
                    model_name=name,
                    metrics=_checkpoint_metrics(event["step"], event["metrics"]),
                    prefix=prefix,
                )
            )
            text = f"Checkpoint created at step {event['step']}: {name}"
            repository.add_event(session, self.job.id, text, id=event_id)

    def _upload_log(self) -> None:
        path = self.folder / "trainer.log"
        with suppress(Exception):  # a log that cannot be stored must not stop a training
            self.services.storage.put_file(log_key(self.job.id, self.job.attempt), path)

    # -- after -------------------------------------------------------------------------------------------------

    def _finish(self, status: int) -> None:
        if status == 0 and self.outcome is not None and self.outcome["kind"] == "done":
            self._succeed(self.outcome)
        elif self.outcome is not None and self.outcome["kind"] == "failed":
            self._fail(self.outcome["code"], self.outcome["message"], self.outcome["param"])
        elif self.overdue:
            message = (
                f"The job trained for {self.job.timeout_seconds} s, which is its 'timeout_seconds'. "
                "Its checkpoints are kept: a new job can start from one."
            )
            self._fail("timeout_exceeded", message, "timeout_seconds")
        elif status == STOPPED and self.lease.paused:
            self.lease.write(
                lambda session: self._end(session, Status.QUEUED, "The job waits, paused; its GPU is free.")
            )
        elif status == STOPPED and self.stopping.is_set():
            self.lease.write(
                lambda session: self._end(session, Status.QUEUED, "The worker stops; the job will resume.")
            )
        elif self.outcome is not None and self.outcome["kind"] == "broken":
            self._recover(f"The trainer could not go on ({self.outcome['reason']}).")
        else:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            self._recover(f"The trainer died ({how}).")

    def _succeed(self, outcome: dict[str, Any]) -> None:
        """Upload the artifact, then make it visible in one transaction."""
        name, result_id = model_name(self.job), new_id("file")
        storage, result = self.services.storage, self.folder / "result.csv"
        storage.put_folder(f"{self.prefix}/model", self.folder / "output")
        storage.put_file(f"files/{result_id}", result)
        adapter = self.job.spec["adapter"]
        verdicts = gates.judge(self.spec, outcome["metrics"])
        size = sum(path.stat().st_size for path in (self.folder / "output").rglob("*") if path.is_file())

        def write(session: Session) -> None:
            if verdicts:
                # The row first: a job's events are numbered in the order of their commits.
                if not repository.write_guarded(session, self.job.id, self.job.attempt, gates=verdicts):
                    raise LeaseLost
                level = "info" if all(gate["met"] for gate in verdicts) else "warn"
                repository.add_event(session, self.job.id, gates.summary(verdicts), level=level)
            self._end(
                session,
                Status.SUCCEEDED,
                f"The job has succeeded. New fine-tuned model: {name}",
                gates=verdicts or None,
                pace=outcome["pace"],
                fine_tuned_model=name,
                trained_tokens=outcome["trained_tokens"],
                result_files=[result_id],
                metrics=outcome["metrics"],
            )
            session.add(
                Model(
                    name=name,
                    kind="reward" if self.spec.trains_rewards else "full" if adapter == "none" else "adapter",
                    project=self.job.project,
                    created_at=database_now(),
                    base_model=self.job.base_model,
                    job_id=self.job.id,
                    prefix=f"{self.prefix}/model",
                    bytes=size,
                    revision=None,
                    details={
                        "adapter": adapter,
                        "quantization": self.job.spec["quantization"],
                        "foundation": self.job.foundation,
                    },
                )
            )
            session.add(
                File(
                    id=result_id,
                    project=self.job.project,
                    filename="step_metrics.csv",
                    purpose="fine-tune-results",
                    bytes=result.stat().st_size,
                    sha256="",
                    created_at=database_now(),
                )
            )

        self.lease.write(write)

    def _fail(self, code: str, message: str, param: str | None) -> bool:
        error = {"code": code, "message": message, "param": param}
        self.lease.write(lambda session: self._end(session, Status.FAILED, message, level="error", error=error))
        return False

    def _end(self, session: Session, target: Status, message: str, **values: Any) -> None:
        taken = repository.transition(
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
                repository.recover(session, current, Actor.RUNNER, reason)

        with suppress(LeaseLost):
            self.lease.write(write)


def _columns(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """The job's columns after `batch`."""
    columns: dict[str, Any] = {}
    for event in batch:
        if event["kind"] == "stage":
            columns["stage"] = event["stage"]
        elif event["kind"] == "metrics":
            columns["progress"] = {
                "step": event["step"],
                "total_steps": event["total_steps"],
                "seconds_remaining": event["seconds_remaining"],
                "tokens_per_second": event["metrics"].get("tokens_per_second"),
            }
            columns["metrics"] = (columns.get("metrics") or {}) | event["metrics"]
            columns["stage"] = event["stage"]
        elif event["kind"] == "checkpoint":
            columns["lost_attempts"] = 0
    return columns or {"lost_attempts": Job.lost_attempts}


def _checkpoint_metrics(step: int, metrics: dict[str, float]) -> dict[str, float]:
    """The contract's names beside ours."""
    names = {
        "train_loss": "loss",
        "train_mean_token_accuracy": "mean_token_accuracy",
        "valid_loss": "eval/loss",
        "valid_mean_token_accuracy": "eval/mean_token_accuracy",
    }
    contract = {theirs: metrics[ours] for theirs, ours in names.items() if ours in metrics}
    return {"step": float(step), **contract, **metrics}


def _read_lines(process: subprocess.Popen[bytes], lines: "queue.Queue[bytes | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _drain(lines: "queue.Queue[bytes | None]") -> tuple[list[dict[str, Any]], bool]:
    """(events that came within a moment, whether the trainer closed its output)."""
    batch: list[dict[str, Any]] = []
    with suppress(queue.Empty):
        line = lines.get(timeout=0.25)
        while True:
            if line is None:
                return batch, True
            batch.append(json.loads(line))
            line = lines.get_nowait()
    return batch, False
