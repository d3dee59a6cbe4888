"""What can be done with jobs over HTTP."""

from collections.abc import Iterator

from sqlalchemy.orm import Session

from app.broker import Broker, Lane
from app.database import Database, database_now, new_id
from app.errors import Conflict, NotFound, ServiceError
from app.files import repository as files
from app.jobs import repository
from app.jobs.schemas import CheckpointObject, EventObject, JobObject
from app.jobs.spec import JobSpec
from app.jobs.states import ACTIVE, Actor, Status
from app.jobs.tables import Job
from app.models import repository as models
from app.storage import Storage


def log_key(job_id: str, attempt: int) -> str:
    """Where the trainer's log of an attempt is in the object store."""
    return f"jobs/{job_id}/attempt-{attempt}/trainer.log"


def not_found(job_id: str, param: str | None = None) -> NotFound:
    return NotFound(f"No such fine-tuning job: {job_id}", param=param, code="fine_tuning_job_not_found")


class Jobs:
    """Create, find, follow and cancel jobs."""

    def __init__(self, database: Database, storage: Storage, broker: Broker) -> None:
        self.database, self.storage, self.broker = database, storage, broker

    def create(self, project: str, spec: JobSpec) -> JobObject:
        """Check what the spec names, store the job, then wake a worker of the CPU lane to check its files."""
        with self.database.write() as session:
            model = models.find(session, project, spec.model)
            if model is None:
                raise ServiceError(
                    f"The model '{spec.model}' does not exist. GET /v1/models lists those that do.",
                    param="model",
                    code="model_not_found",
                )
            if model.kind == "reward":
                message = f"'{spec.model}' is a reward model, which cannot be trained further."
                raise ServiceError(message, param="model", code="invalid_value")
            self._check_reference(session, project, spec)
            for field, file_id in spec.files():
                file = files.get(session, project, file_id, lock=True)
                if file is None:
                    raise ServiceError(f"No such File object: {file_id}", param=field, code="file_not_found")
                if file.purpose != "fine-tune":
                    message = f"{file_id} has the purpose '{file.purpose}'; upload it as 'fine-tune'."
                    raise ServiceError(message, param=field, code="invalid_file_purpose")
            if model.kind == "adapter" and spec.adapter is not None:
                message = f"'{spec.model}' has an adapter, and training goes on with it; leave 'adapter' out."
                raise ServiceError(message, param="adapter", code="invalid_value")
            resolved = (spec.model_copy(update={"adapter": model.adapter}) if model.adapter else spec).resolved()
            job = Job(
                id=new_id("ftjob"),
                project=project,
                created_at=database_now(),
                model=spec.model,
                base_model=model.base_model,
                foundation=model.foundation,
                training_file=spec.training_file,
                validation_file=spec.validation_file,
                spec=resolved.model_dump(mode="json"),
                job_metadata=spec.metadata,
                priority=spec.priority,
                status=Status.VALIDATING,
                result_files=[],
                attempt=0,
                eligible_at=0.0,
                lost_attempts=0,
            )
            session.add(job)
            session.flush()
            repository.add_event(session, job.id, f"Created fine-tuning job: {job.id}")
        self.broker.wake(Lane.CPU)
        return self.get(project, job.id)

    def _check_reference(self, session: Session, project: str, spec: JobSpec) -> None:
        if spec.reference_model is None:
            return
        param = "method.dpo.hyperparameters.reference_model"
        found = models.find(session, project, spec.reference_model)
        if found is None:
            message = f"The model '{spec.reference_model}' does not exist. GET /v1/models lists those that do."
            raise ServiceError(message, param=param, code="model_not_found")
        if found.kind == "reward":
            message = f"'{spec.reference_model}' is a reward model, which has no log-probs."
            raise ServiceError(message, param=param, code="invalid_value")

    def get(self, project: str, job_id: str) -> JobObject:
        with self.database.read() as session:
            job = repository.get(session, project, job_id)
            if job is None:
                raise not_found(job_id)
            return JobObject.of(job, repository.queue_position(session, job), repository.now(session))

    def page(self, project: str, *, after: str | None, limit: int, metadata: dict[str, str]) -> list[JobObject]:
        """Up to `limit` + 1 jobs, newest first."""
        with self.database.read() as session:
            mark = None
            if after is not None and (mark := repository.get(session, project, after)) is None:
                raise not_found(after, "after")
            found = repository.page(session, project, after=mark, limit=limit, metadata=metadata)
            now = repository.now(session)
            return [JobObject.of(job, repository.queue_position(session, job), now) for job in found]

    def cancel(self, project: str, job_id: str) -> JobObject:
        """Cancel an unfinished job. Its worker notices at its next heartbeat, seconds later."""
        with self.database.write() as session:
            job = repository.get(session, project, job_id)
            if job is None:
                raise not_found(job_id)
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
                raise Conflict(f"Job {job_id} is {job.status} already.", code="job_already_ended")
        return self.get(project, job_id)

    def events(self, project: str, job_id: str, *, after: str | None, limit: int) -> list[EventObject]:
        """Up to `limit` + 1 events, newest first."""
        self.get(project, job_id)
        with self.database.read() as session:
            found = repository.events(session, job_id, after=after, limit=limit)
        if found is None:
            raise NotFound(f"No such event of this job: {after}", param="after", code="event_not_found")
        return [EventObject.of(event) for event in found]

    def checkpoints(self, project: str, job_id: str, *, after: str | None, limit: int) -> list[CheckpointObject]:
        """Up to `limit` + 1 checkpoints, latest step first."""
        self.get(project, job_id)
        with self.database.read() as session:
            found = repository.checkpoints(session, job_id, after=after, limit=limit)
        if found is None:
            raise NotFound(f"No such checkpoint of this job: {after}", param="after", code="checkpoint_not_found")
        return [CheckpointObject.of(checkpoint) for checkpoint in found]

    def logs(self, project: str, job_id: str) -> Iterator[bytes]:
        """The trainer's log of the latest attempt that has one."""
        for attempt in range(self.get(project, job_id).attempt, 0, -1):
            try:
                return self.storage.chunks(log_key(job_id, attempt))
            except FileNotFoundError:
                continue
        return iter(())
