"""CPU lane: check the files of a new job, then put it in the queue or fail it with line and field."""

import tempfile
from contextlib import suppress
from pathlib import Path

import structlog
from sqlalchemy.orm import Session

from app.broker import Lane
from app.datasets.check import Report, check
from app.datasets.reader import DatasetError
from app.estimates.service import expected_seconds
from app.evaluations.spec import EvaluationSpec
from app.jobs import repository
from app.jobs.spec import JobSpec
from app.jobs.states import Actor, Status
from app.jobs.tables import EVALUATION, Job
from app.services import Services
from worker.classifier import BadClassifier, LinearClassifier
from worker.lease import Lease, LeaseLost
from worker.work import work_folder

log = structlog.get_logger(__name__)


def validate(services: Services, job: Job) -> None:
    """Check the files of `job`, whose lease this worker has."""
    queued = False
    with Lease(services.database, job.id, job.attempt) as lease, suppress(LeaseLost):
        queued = _validate(services, job, lease)
    if queued:
        services.broker.wake(Lane.GPU)


def _validate(services: Services, job: Job, lease: Lease) -> bool:
    """Whether the job is in the queue now."""
    spec = EvaluationSpec.stored(job.spec) if job.kind == EVALUATION else JobSpec.stored(job.spec)
    reports: dict[str, Report] = {}
    try:
        for field, file_id in spec.files():
            if (report := _check(services, spec, field, file_id)) is not None:
                reports[field] = report
    except _InvalidFile as invalid:
        _fail(lease, job, invalid)
        return False
    except Exception as error:  # storage or disk: another attempt may do better, and they are counted
        log.error("files could not be checked", job=job.id, exc_info=error)
        lease.write(lambda session: repository.recover(session, job, Actor.VALIDATOR, "The files could not be read."))
        return False

    def write(session: Session) -> bool:
        expected = expected_seconds(session, spec, job.base_model, reports) if isinstance(spec, JobSpec) else None
        return repository.transition(
            session,
            job.id,
            Status.VALIDATING,
            Status.QUEUED,
            actor=Actor.VALIDATOR,
            attempt=job.attempt,
            lost_attempts=0,  # what follows has its own chances
            estimated_seconds=expected,
            message="Files validated, job queued: "
            + "; ".join(f"{field}: {report.summary()}" for field, report in reports.items()),
        )

    return lease.write(write)


class _InvalidFile(Exception):
    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field, self.reason = field, reason


def _check(services: Services, spec: JobSpec | EvaluationSpec, field: str, file_id: str) -> Report | None:
    """What is in a file; None for one that has no rows."""
    need = spec.needs(field)
    with tempfile.TemporaryDirectory(dir=work_folder(services)) as folder:
        path = Path(folder) / "file"
        try:
            services.storage.get_file(f"files/{file_id}", path)
        except FileNotFoundError:
            raise _InvalidFile(field, f"the file {file_id} is gone") from None
        try:
            if need is None:
                LinearClassifier.load(path)
                return None
            with path.open("rb") as file:
                return check(file, need, spec.reads(field))
        except (DatasetError, BadClassifier) as error:
            raise _InvalidFile(field, str(error)) from error


def _fail(lease: Lease, job: Job, invalid: _InvalidFile) -> None:
    name = "file" if job.kind == EVALUATION else invalid.field.removeprefix("sft.")
    used = "evaluated" if job.kind == EVALUATION else "trained on"
    error = {"code": f"invalid_{name}", "message": invalid.reason, "param": invalid.field}
    lease.write(
        lambda session: repository.transition(
            session,
            job.id,
            Status.VALIDATING,
            Status.FAILED,
            actor=Actor.VALIDATOR,
            attempt=job.attempt,
            message=f"{invalid.field} cannot be {used}. {invalid.reason}",
            level="error",
            error=error,
        )
    )
