"""What can be done with jobs over HTTP."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any, cast
from urllib.parse import quote

import structlog
from fastapi.sse import ServerSentEvent
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.broker import Broker, Lane
from app.database import Database, new_id
from app.datasets.mapping import Mapping
from app.errors import Conflict, NotFound, ServiceError
from app.estimates import fit
from app.files import repository as files
from app.files.tables import File
from app.idempotency.service import Sending
from app.jobs import repository
from app.jobs.feed import Feed
from app.jobs.outlook import outlook
from app.jobs.schemas import CheckpointObject, EventObject, JobObject, MetricSeries, Point, StreamToken
from app.jobs.series import downsample
from app.jobs.spec import JobSpec
from app.jobs.states import ACTIVE, Actor, Status
from app.jobs.tables import Job
from app.keys.service import Keys
from app.models import repository as models
from app.storage import Storage
from app.workers import repository as workers

log = structlog.get_logger(__name__)

STREAM_BATCH = 500
STATE_SECONDS = 5.0
"""A stream looks at the job's state at least so often: its queue position changes without an event."""


def _state(job: JobObject) -> dict[str, Any]:
    """What a follower wants to hear of when it changes: not the estimates, which move with the clock."""
    return job.model_dump(exclude={"estimated_start", "estimated_finish", "running_seconds"})


def log_key(job_id: str, attempt: int) -> str:
    """Where the trainer's log of an attempt is in the object store."""
    return f"jobs/{job_id}/attempt-{attempt}/trainer.log"


def not_found(job_id: str, param: str | None = None) -> NotFound:
    return NotFound(f"No such fine-tuning job: {job_id}", param=param, code="fine_tuning_job_not_found")


class Jobs:
    """Create, find, follow and cancel jobs."""

    def __init__(self, database: Database, storage: Storage, broker: Broker, keys: Keys) -> None:
        self.database, self.storage, self.broker, self.keys = database, storage, broker, keys
        self.feed = Feed(database)

    def create(self, project: str, spec: JobSpec, sending: Sending) -> JobObject:
        """Check what the spec names, store the job, then wake a worker of the CPU lane to check its files."""
        content = spec.to_store()
        with self.database.write() as session:
            earlier = sending.earlier(session, "jobs.create", content)
            job = None if earlier is None else repository.get(session, project, earlier)
            if job is None:
                job = self._insert(session, project, spec, sending.request_id)
                sending.made(session, "jobs.create", content, job.id)
        log.info("job accepted", job=job.id, project=project, request=sending.request_id)
        self.broker.wake(Lane.CPU)
        return JobObject.of(job) if earlier is None else self.get(project, job.id)

    def prepare(self, session: Session, project: str, spec: JobSpec) -> tuple[models.Found, JobSpec]:
        """(what the job starts from, the spec as it would be run). Raises `ServiceError` for what cannot be run."""
        model = self._model(session, project, spec)
        self._check_reference(session, project, spec)
        spec = self._with_mappings(spec, self._files(session, project, spec))
        self._check_integrations(session, spec)
        return model, (spec.model_copy(update={"adapter": model.adapter}) if model.adapter else spec).resolved()

    def _insert(self, session: Session, project: str, spec: JobSpec, request_id: str | None) -> Job:
        model, resolved = self.prepare(session, project, spec)
        shape, device = fit.shape_of(session, model), fit.device_of(session, model)
        if shape is not None and device is not None:
            reason = fit.refusal(resolved, shape, device, None)
            if reason is not None:
                raise ServiceError(reason[1], param=reason[0], code=fit.CODE)
        job = Job(
            id=new_id("ftjob"),
            project=project,
            model=spec.model,
            base_model=model.base_model,
            foundation=model.foundation,
            training_file=spec.training_file,
            validation_file=spec.validation_file,
            spec=resolved.to_store(),
            job_metadata=spec.metadata,
            request_id=request_id,
            priority=spec.priority,
            timeout_seconds=spec.timeout_seconds,
            status=Status.VALIDATING,
            paused=False,
            ran_seconds=0.0,
            result_files=[],
            attempt=0,
            eligible_at=0.0,
            lost_attempts=0,
        )
        session.add(job)
        session.flush()
        repository.add_event(session, job.id, f"Created fine-tuning job: {job.id}")
        return job

    @staticmethod
    def _model(session: Session, project: str, spec: JobSpec) -> models.Found:
        model = models.find(session, project, spec.model, lock=True)
        if model is None:
            raise ServiceError(
                f"The model '{spec.model}' does not exist. GET /v1/models lists those that do.",
                param="model",
                code="model_not_found",
            )
        if model.kind == "reward":
            message = f"'{spec.model}' is a reward model, which cannot be trained further."
            raise ServiceError(message, param="model", code="invalid_value")
        if model.kind == "adapter" and spec.adapter is not None:
            message = f"'{spec.model}' has an adapter, and training goes on with it; leave 'adapter' out."
            raise ServiceError(message, param="adapter", code="invalid_value")
        return model

    @staticmethod
    def _files(session: Session, project: str, spec: JobSpec) -> dict[str, File]:
        """The files of the spec by field; they cannot be deleted until this transaction ends."""
        found = {}
        for field, file_id in spec.files():
            file = files.get(session, project, file_id, lock=True)
            if file is None:
                raise ServiceError(f"No such File object: {file_id}", param=field, code="file_not_found")
            if file.purpose != "fine-tune":
                message = f"{file_id} has the purpose '{file.purpose}'; upload it as 'fine-tune'."
                raise ServiceError(message, param=field, code="invalid_file_purpose")
            found[field] = file
        return found

    @staticmethod
    def _with_mappings(spec: JobSpec, found: dict[str, File]) -> JobSpec:
        """The spec with the mappings that its files were uploaded with, where it names none itself."""
        for prefix, part in (("", spec), ("sft.", spec.sft)):
            own = {field: file.mapping for field, file in found.items() if field.startswith("sft.") == bool(prefix)}
            if part is None or part.mapping is not None or not any(own.values()):
                continue
            training, *others = own.values()
            if any(other != training for other in others):
                message = "The files were uploaded with different mappings; give the one that reads both as 'mapping'."
                raise ServiceError(message, param=f"{prefix}mapping", code="invalid_value")
            mapped = part.model_copy(update={"mapping": Mapping.model_validate(training)})
            spec = spec.model_copy(update={"sft": mapped}) if prefix else cast(JobSpec, mapped)
        return spec

    @staticmethod
    def _check_integrations(session: Session, spec: JobSpec) -> None:
        for number, integration in enumerate(spec.integrations or []):
            present = workers.present(session, Lane.GPU)
            if not any(integration.type in worker.details.get("integrations", []) for worker in present):
                message = "No worker has a key for Weights & Biases: its operator sets WANDB_API_KEY there."
                raise ServiceError(message, param=f"integrations.{number}.type", code="integration_not_configured")

    def _check_reference(self, session: Session, project: str, spec: JobSpec) -> None:
        if spec.reference_model is None:
            return
        param = "method.dpo.hyperparameters.reference_model"
        found = models.find(session, project, spec.reference_model, lock=True)
        if found is None:
            message = f"The model '{spec.reference_model}' does not exist. GET /v1/models lists those that do."
            raise ServiceError(message, param=param, code="model_not_found")
        if found.kind == "reward":
            message = f"'{spec.reference_model}' is a reward model, which has no log-probs."
            raise ServiceError(message, param=param, code="invalid_value")

    @staticmethod
    def _found(session: Session, project: str, job_id: str) -> Job:
        """The row of a job that `project` may see. Raises `NotFound`."""
        job = repository.get(session, project, job_id)
        if job is None:
            raise not_found(job_id)
        return job

    def get(self, project: str, job_id: str) -> JobObject:
        with self.database.read() as session:
            job = self._found(session, project, job_id)
            places = outlook(session, [job])
            return JobObject.of(job, places.get(job.id))

    def page(self, project: str, *, after: str | None, limit: int, metadata: dict[str, str]) -> list[JobObject]:
        """Up to `limit` + 1 jobs, newest first."""
        with self.database.read() as session:
            mark = None
            if after is not None and (mark := repository.get(session, project, after)) is None:
                raise not_found(after, "after")
            found = repository.page(session, project, after=mark, limit=limit, metadata=metadata)
            places = outlook(session, found)
            return [JobObject.of(job, places.get(job.id)) for job in found]

    def cancel(self, project: str, job_id: str, sending: Sending) -> JobObject:
        """Cancel an unfinished job. Its worker notices at its next heartbeat, seconds later."""
        with self.database.write() as session:
            job = self._found(session, project, job_id)
            status = Status(job.status)
            # The worker may take the job along an edge of its own between this read and the write.
            for source in (status, *(other for other in ACTIVE if other != status)):
                if status in ACTIVE and repository.transition(
                    session,
                    job_id,
                    source,
                    Status.CANCELLED,
                    actor=Actor.API,
                    message="The job was cancelled.",
                ):
                    break
            else:
                if not (sending.resent and status == Status.CANCELLED):  # the answer to the first sending was lost
                    raise Conflict(f"Job {job_id} is {job.status} already.", code="job_already_ended")
        return self.get(project, job_id)

    def pause(self, project: str, job_id: str) -> JobObject:
        """Hold a job back. A running one writes a checkpoint, frees its GPU and goes back to the queue, in seconds."""
        return self._set_paused(project, job_id, True, "The job was paused.")

    def resume(self, project: str, job_id: str) -> JobObject:
        """Let a paused job go on from its last checkpoint, in its old place in the queue."""
        found = self._set_paused(project, job_id, False, "The job was resumed.")
        self.broker.wake(Lane.GPU)
        return found

    def _set_paused(self, project: str, job_id: str, paused: bool, message: str) -> JobObject:
        with self.database.write() as session:
            job = self._found(session, project, job_id)
            if job.paused != paused or job.status not in ACTIVE:
                if not repository.set_paused(session, job_id, paused):
                    raise Conflict(f"Job {job_id} is {job.status} already.", code="job_already_ended")
                repository.add_event(session, job_id, message)
        return self.get(project, job_id)

    def events(self, project: str, job_id: str, *, after: str | None, limit: int) -> list[EventObject]:
        """Up to `limit` + 1 events, newest first."""
        with self.database.read() as session:
            self._found(session, project, job_id)
            found = repository.events(session, job_id, after=after, limit=limit)
        if found is None:
            raise NotFound(f"No such event of this job: {after}", param="after", code="event_not_found")
        return [EventObject.of(event) for event in found]

    def metrics(self, project: str, job_id: str, names: list[str] | None, points: int) -> MetricSeries:
        """The series of each metric, or of those of `names`, with at most `points` points each.

        After a resume the steps since the checkpoint are measured again: the last measurement of a step counts.
        """
        with self.database.read() as session:
            self._found(session, project, job_id)
            measured = repository.metrics(session, job_id)
        series: dict[str, dict[int, float]] = {}
        stages: dict[str, int] = {}
        for data in measured:
            stages.setdefault(data["stage"], data["step"])
            for name, value in data.items():
                if isinstance(value, float) and name != "train_loss" and (names is None or name in names):
                    series.setdefault(name, {})[data["step"]] = value
        return MetricSeries(
            job_id=job_id,
            stages=stages,
            series={
                name: [Point(step=step, value=value) for step, value in downsample(sorted(found.items()), points)]
                for name, found in sorted(series.items())
            },
        )

    def stream_token(self, project: str, job_id: str) -> StreamToken:
        """What a browser, whose EventSource sends no key, can open the job's stream with."""
        with self.database.read() as session:
            self._found(session, project, job_id)
        path = f"/v1/fine_tuning/jobs/{job_id}/stream"
        token, expires_at = self.keys.stream_token(project, path)
        return StreamToken(token=token, expires_at=expires_at, url=f"{path}?token={quote(token, safe='')}")

    async def stream(self, project: str, job_id: str, seen: int) -> AsyncIterator[ServerSentEvent]:
        """The job's events after number `seen` and its state, then both as they come, until the job has ended.

        Each event has its id; the state has none, and comes after the events that changed it.
        """
        shown: JobObject | None = None
        async with self.feed.follow(job_id, seen) as follower:
            while True:
                follower.news.clear()
                # The state before the events: of a job that has ended, the events are then all there are.
                job = await run_in_threadpool(self.get, project, job_id)
                events = await run_in_threadpool(self.feed.after, job_id, follower.seen)
                for event in events:
                    follower.seen = event.sequence
                    yield ServerSentEvent(event=event.type, id=event.id, data=EventObject.of(event))
                if len(events) >= STREAM_BATCH:
                    continue  # there may be more
                if shown is None or _state(job) != _state(shown):
                    shown = job
                    yield ServerSentEvent(event="job", data=job)
                if job.status not in ACTIVE:
                    return
                if events:
                    continue  # they may have changed the state
                with suppress(TimeoutError):
                    await asyncio.wait_for(follower.news.wait(), STATE_SECONDS)
                if self.feed.closed:
                    return

    def seen(self, project: str, job_id: str, last_event_id: str | None) -> int:
        """The number of an event of the job; 0 is before the first."""
        with self.database.read() as session:
            self._found(session, project, job_id)
            if last_event_id is None:
                return 0
            found = repository.sequence_of(session, job_id, last_event_id)
        if found is None:
            message = f"No such event of this job: {last_event_id}"
            raise NotFound(message, param="Last-Event-ID", code="event_not_found")
        return found

    def checkpoints(self, project: str, job_id: str, *, after: str | None, limit: int) -> list[CheckpointObject]:
        """Up to `limit` + 1 checkpoints, latest step first."""
        with self.database.read() as session:
            self._found(session, project, job_id)
            found = repository.checkpoints(session, job_id, after=after, limit=limit)
        if found is None:
            raise NotFound(f"No such checkpoint of this job: {after}", param="after", code="checkpoint_not_found")
        return [CheckpointObject.of(checkpoint) for checkpoint in found]

    def logs(self, project: str, job_id: str) -> Iterator[bytes]:
        """The trainer's log of the latest attempt that has one."""
        with self.database.read() as session:
            attempts = self._found(session, project, job_id).attempt
        for attempt in range(attempts, 0, -1):
            try:
                return self.storage.chunks(log_key(job_id, attempt))
            except FileNotFoundError:
                continue
        return iter(())
