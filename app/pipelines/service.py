"""The HTTP operations on pipelines, and the look that takes them further."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import structlog
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from app.broker import Broker, Lane
from app.database import Database, new_id
from app.errors import Conflict, Forbidden, ServiceError, TooMany, Unavailable, no_such
from app.idempotency.service import RequestIdentity
from app.jobs.lifecycle import Lifecycle
from app.jobs.sides import require_reachable
from app.jobs.states import ACTIVE
from app.jobs.tables import Job
from app.pagination import keyset
from app.pipelines.advance import Makers, advance, end, jobs_of
from app.pipelines.schemas import PipelineObject
from app.pipelines.tables import Pipeline, PipelineStage
from app.spec.evaluation import Endpoint
from app.spec.json_types import JsonObject
from app.spec.pipeline import PipelineSpec

log = structlog.get_logger(__name__)
TEMPORARY = (Forbidden, TooMany, Unavailable)
"""Refusals of a stage that end by themselves: a limit of the project, or something that is away. It begins later."""
TEMPORARY_CODES = ("integration_not_configured",)
"""The same, by their codes: no worker is there at present."""


class Pipelines:
    """Create, find, pause and cancel pipelines, and take them further."""

    def __init__(self, database: Database, broker: Broker, makers: Makers, private_hosts: tuple[str, ...]) -> None:
        self.database, self.broker, self.makers, self.private_hosts = database, broker, makers, private_hosts

    def create(self, project: str, spec: PipelineSpec, identity: RequestIdentity) -> PipelineObject:
        """Store the pipeline and begin its first stages. Raises `ServiceError` if one of them cannot run."""
        content = spec.model_dump(mode="json", exclude_unset=True)
        require_reachable(_endpoints(spec), self.private_hosts)
        with self.database.write() as session:
            earlier_id = identity.earlier(session, "pipelines.create", content)
            pipeline = None if earlier_id is None else session.get(Pipeline, earlier_id)
            if pipeline is None:
                pipeline = Pipeline(
                    id=new_id("pipeline"),
                    project=project,
                    name=spec.name,
                    spec=_without_keys(spec.model_dump(mode="json", exclude_unset=True)) | {"rounds": spec.rounds},
                    sealed_spec=self.makers.secret_box.seal(spec.model_dump_json(exclude_unset=True)),
                    request_id=identity.request_id,
                    pipeline_metadata=spec.metadata,
                    status="running",
                    paused=False,
                    round=1,
                    variables={name: variable.first for name, variable in spec.variables.items()},
                    results=[],
                )
                session.add(pipeline)
                session.flush()
                advance(session, self.makers, pipeline)
                identity.record(session, "pipelines.create", content, pipeline.id)
            (shown,) = _shown(session, [pipeline])
        log.info("pipeline accepted", pipeline=shown.id, project=project, request=identity.request_id)
        self.broker.wake(Lane.CPU)
        return shown

    def look(self) -> None:
        """Take the pipelines further in which a stage has ended. One that cannot go on fails with the reason."""
        of_round = (PipelineStage.pipeline_id == Pipeline.id, PipelineStage.round == Pipeline.round)
        ended = select(Job.id).join(PipelineStage, PipelineStage.job_id == Job.id)
        ended = ended.where(*of_round, Job.status.not_in(ACTIVE)).correlate(Pipeline)
        running = select(Pipeline.id).where(Pipeline.status == "running", Pipeline.paused.is_(False), ended.exists())
        with self.database.read() as session:
            ids = session.scalars(running.order_by(Pipeline.created_at)).all()
        for pipeline_id in ids:
            try:
                begun = self._advance(pipeline_id)
            except Exception as error:  # the others go on, and the next look tries again
                log.error("pipeline not taken further", pipeline=pipeline_id, exc_info=error)
            else:
                if begun:
                    self.broker.wake(Lane.CPU)

    def _advance(self, pipeline_id: str) -> bool:
        """Take one pipeline further, in a transaction of its own. Returns whether a stage has begun."""
        try:
            with self.database.write() as session:
                pipeline = _locked(session, pipeline_id)
                return pipeline is not None and advance(session, self.makers, pipeline)
        except TEMPORARY as error:
            log.warning("pipeline waits", pipeline=pipeline_id, reason=error.message)
            return False
        except ServiceError as error:
            if error.code in TEMPORARY_CODES:
                return False
            with self.database.write() as session:
                pipeline = _locked(session, pipeline_id)
                if pipeline is not None:
                    reason = {"code": error.code or "invalid_value", "message": error.message, "param": error.param}
                    end(session, pipeline, "failed", error=reason)
            return False

    def get(self, project: str, pipeline_id: str) -> PipelineObject:
        with self.database.read() as session:
            return _shown(session, [self._require(session, project, pipeline_id)])[0]

    def page(self, project: str, *, after: str | None, limit: int) -> list[PipelineObject]:
        """Up to `limit` + 1 pipelines, newest first."""
        with self.database.read() as session:
            last = None if after is None else self._require(session, project, after, "after")
            statement = select(Pipeline).where(Pipeline.project == project)
            found = session.scalars(keyset(statement, (Pipeline.created_at, Pipeline.id), last, limit)).all()
            return _shown(session, found, only_current=True)

    def cancel(self, project: str, pipeline_id: str, identity: RequestIdentity) -> PipelineObject:
        """Cancel a pipeline and its unfinished jobs. After a failure on the way, the same request goes on."""
        with self.database.write() as session:
            pipeline = self._require(session, project, pipeline_id, lock=True)
            if pipeline.status == "cancelled" and identity.resent:
                return _shown(session, [pipeline])[0]
            _require_running(pipeline)
            pipeline.paused = True  # nothing begins meanwhile
            jobs = _unfinished(session, pipeline)
        for job in jobs:
            with suppress(Conflict):  # it has just ended
                self._lifecycle(job).cancel(project, job.id, identity)
        with self.database.write() as session:
            pipeline = self._require(session, project, pipeline_id, lock=True)
            if pipeline.status == "running":
                pipeline.paused = False
                end(session, pipeline, "cancelled")
            return _shown(session, [pipeline])[0]

    def set_paused(self, project: str, pipeline_id: str, paused: bool) -> PipelineObject:
        """Pause a pipeline and its unfinished jobs, or resume them."""
        with self.database.write() as session:
            pipeline = self._require(session, project, pipeline_id, lock=True)
            _require_running(pipeline)
            pipeline.paused = paused
            jobs = _unfinished(session, pipeline)
        for job in jobs:
            with suppress(Conflict):
                lifecycle = self._lifecycle(job)
                (lifecycle.pause if paused else lifecycle.resume)(project, job.id)
        return self.get(project, pipeline_id)

    def _lifecycle(self, job: Job) -> Lifecycle[Any]:
        services: tuple[Lifecycle[Any], ...] = (self.makers.jobs, self.makers.evaluations, self.makers.labellings)
        return next(service for service in services if service.KIND.name == job.kind)

    @staticmethod
    def _require(
        session: Session, project: str, pipeline_id: str, param: str | None = None, *, lock: bool = False
    ) -> Pipeline:
        statement = select(Pipeline).where(Pipeline.project == project, Pipeline.id == pipeline_id)
        pipeline = session.scalar(statement.with_for_update() if lock else statement)
        if pipeline is None:
            raise no_such("pipeline", pipeline_id, code="pipeline", param=param)
        return pipeline


def _require_running(pipeline: Pipeline) -> None:
    if pipeline.status != "running":
        raise Conflict(f"Pipeline {pipeline.id} is {pipeline.status} already.", code="job_already_ended")


def _unfinished(session: Session, pipeline: Pipeline) -> list[Job]:
    """The unfinished jobs of a pipeline: those of its stages, and evaluations that its trainings asked for."""
    stages = select(PipelineStage.job_id).where(PipelineStage.pipeline_id == pipeline.id)
    jobs = select(Job).where(or_(Job.id.in_(stages), Job.parent_id.in_(stages)), Job.status.in_(ACTIVE))
    return list(session.scalars(jobs))


def _shown(session: Session, pipelines: Sequence[Pipeline], *, only_current: bool = False) -> list[PipelineObject]:
    """The API objects of `pipelines`. `only_current`: with no round but the one under way."""
    jobs = jobs_of(session, pipelines, only_current=only_current)
    return [PipelineObject.of(pipeline, jobs[pipeline.id], only_current) for pipeline in pipelines]


def _locked(session: Session, pipeline_id: str) -> Pipeline | None:
    """A running pipeline, locked; None if another look has it, or if it has ended."""
    statement = select(Pipeline).where(Pipeline.id == pipeline_id, Pipeline.status == "running")
    return session.scalar(statement.with_for_update(skip_locked=True))


def _endpoints(spec: PipelineSpec) -> Sequence[tuple[str, Endpoint]]:
    """(field, endpoint) of every endpoint that a stage asks."""
    found: list[tuple[str, Endpoint]] = []
    for number, stage in enumerate(spec.stages):
        if stage.labelling is not None:
            found += [(f"stages.{number}.labelling.{field}", one) for field, one in stage.labelling.endpoints()]
        evaluations = [("evaluation", stage.evaluation)] if stage.evaluation is not None else []
        if stage.job is not None:
            evaluations += [(f"job.evaluations.{k}", one) for k, one in enumerate(stage.job.evaluations or [])]
        found += [
            (f"stages.{number}.{field}.judge.endpoint", evaluation.judge.endpoint)
            for field, evaluation in evaluations
            if evaluation.judge is not None and evaluation.judge.endpoint is not None
        ]
    return found


def _without_keys(value: object) -> JsonObject:
    """`value` without the API keys of endpoints, at all depths."""
    if isinstance(value, dict):
        return {key: _without_keys(part) for key, part in value.items() if key != "api_key"}
    return [_without_keys(part) for part in value] if isinstance(value, list) else value  # type: ignore[return-value]
