"""The HTTP operations on sweeps."""

from collections.abc import Sequence
from contextlib import suppress

import structlog
from pydantic import ValidationError
from pydantic_core import PydanticCustomError
from sqlalchemy.orm import Session

from app.broker import Broker, Lane
from app.database import Database, new_id
from app.errors import Conflict, NotFound, ServiceError, describe_validation_error, no_such
from app.idempotency.service import RequestIdentity
from app.jobs.kinds import EVALUATION_JOB
from app.jobs.service import Jobs
from app.jobs.states import ACTIVE
from app.jobs.tables import Job
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from app.spec.sweep import Axes, SweepSpec
from app.sweeps import repository
from app.sweeps.frontier import as_csv, svg
from app.sweeps.schemas import SweepObject
from app.sweeps.tables import Sweep

log = structlog.get_logger(__name__)


class Sweeps:
    """Make the jobs of a grid, follow and cancel them, and compare their results."""

    def __init__(self, database: Database, broker: Broker, jobs: Jobs) -> None:
        self.database, self.broker, self.jobs = database, broker, jobs

    def create(self, project: str, spec: SweepSpec, identity: RequestIdentity) -> SweepObject:
        """Make all jobs of the grid, or none. Raises `ServiceError` for the first that cannot run."""
        content = spec.model_dump(mode="json")
        job_specs = [(values, _job_spec(values, body)) for values, body in spec.bodies()]
        axes = _axes(spec, job_specs[0][1])
        evaluations = (evaluation for _, job in job_specs for evaluation in job.evaluations or [])
        self.jobs.evaluations.require_reachable(evaluations, "job.evaluations.")
        with self.database.write() as session:
            earlier = identity.earlier(session, "sweeps.create", content)
            sweep = None if earlier is None else repository.get(session, project, earlier)
            if sweep is None:
                sweep = self._insert(session, project, spec, job_specs, axes, identity.request_id)
                identity.record(session, "sweeps.create", content, sweep.id)
            shown = self._shown(session, [sweep])[0]
        log.info("sweep accepted", sweep=shown.id, jobs=len(shown.jobs), project=project, request=identity.request_id)
        self.broker.wake(Lane.CPU)
        return shown

    def _insert(
        self,
        session: Session,
        project: str,
        spec: SweepSpec,
        job_specs: Sequence[tuple[JsonObject, JobSpec]],
        axes: Axes | None,
        request_id: str | None,
    ) -> Sweep:
        sweep_id, settings = new_id("sweep"), {}
        for values, job_spec in job_specs:
            try:
                job = self.jobs.add(session, project, job_spec, request_id, sweep_id=sweep_id)
            except ServiceError as error:
                error.param = f"job.{error.param}"
                raise
            settings[job.id] = values
        sweep = Sweep(
            id=sweep_id,
            project=project,
            name=spec.name,
            grid=spec.grid,
            settings={"jobs": settings, "frontier": axes.model_dump() if axes is not None else None},
            sweep_metadata=spec.metadata,
        )
        session.add(sweep)
        session.flush()
        session.refresh(sweep)
        return sweep

    @staticmethod
    def _shown(session: Session, sweeps: Sequence[Sweep]) -> list[SweepObject]:
        ids = [sweep.id for sweep in sweeps]
        jobs: dict[str, tuple[list[Job], list[Job]]] = {sweep_id: ([], []) for sweep_id in ids}
        """(trainings, evaluations) of each sweep."""
        for job in repository.jobs(session, ids):
            jobs[str(job.sweep_id)][job.kind == EVALUATION_JOB.name].append(job)
        return [SweepObject.of(sweep, *jobs[sweep.id]) for sweep in sweeps]

    def get(self, project: str, sweep_id: str) -> SweepObject:
        with self.database.read() as session:
            return self._shown(session, [self._require(session, project, sweep_id)])[0]

    def page(self, project: str, *, after: str | None, limit: int) -> list[SweepObject]:
        """Up to `limit` + 1 sweeps, newest first."""
        with self.database.read() as session:
            last_sweep = None if after is None else self._require(session, project, after, "after")
            return self._shown(session, repository.page(session, project, after=last_sweep, limit=limit))

    def cancel(self, project: str, sweep_id: str, identity: RequestIdentity) -> SweepObject:
        """Cancel the jobs and evaluations of a sweep that have not ended."""
        sweep = self.get(project, sweep_id)
        if sweep.status != "running" and not identity.resent:
            raise Conflict(f"Sweep {sweep_id} is {sweep.status} already.", code="job_already_ended")
        for job in sweep.jobs:
            with suppress(Conflict):  # the job has just ended
                if job.status in ACTIVE:
                    self.jobs.cancel(project, job.id, identity)
            for evaluation in job.evaluations.values():
                with suppress(Conflict):
                    if evaluation.status in ACTIVE:
                        self.jobs.evaluations.cancel(project, evaluation.id, identity)
        return self.get(project, sweep_id)

    def frontier(self, project: str, sweep_id: str, format: str) -> tuple[str, str]:
        """(content, media type) of the frontier so far: a chart for the format `svg`, a table for `csv`."""
        sweep = self.get(project, sweep_id)
        points = sweep.points()
        if sweep.frontier is None or not points:
            lacks = "names no frontier metrics" if sweep.frontier is None else "has no job with both frontier metrics"
            message = f"Sweep {sweep_id} {lacks}: a frontier needs 'frontier.x' and 'frontier.y'."
            raise NotFound(message, code="frontier_not_found")
        if format == "csv":
            return as_csv(points), "text/csv; charset=utf-8"
        title = sweep.name or f"Sweep {sweep_id}"
        return svg(points, sweep.frontier.x, sweep.frontier.y, title), "image/svg+xml"

    @staticmethod
    def _require(session: Session, project: str, sweep_id: str, param: str | None = None) -> Sweep:
        sweep = repository.get(session, project, sweep_id)
        if sweep is None:
            raise no_such("sweep", sweep_id, code="sweep", param=param)
        return sweep


def _axes(spec: SweepSpec, first: JobSpec) -> Axes | None:
    try:
        return spec.axes(first)
    except PydanticCustomError as error:
        raise ServiceError(error.message(), param=(error.context or {})["field"], code="invalid_value") from None


def _job_spec(values: JsonObject, body: JsonObject) -> JobSpec:
    """The spec of one job. `values` are its grid values, which an error names. Raises `ServiceError`."""
    try:
        return JobSpec.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        message, param, _ = describe_validation_error({**first, "loc": ("body", "job", *first["loc"])})
        settings = ", ".join(f"{name}={str(value)[:60]}" for name, value in values.items())
        raise ServiceError(f"{message} (with {settings})", param=param, code="invalid_value") from None
