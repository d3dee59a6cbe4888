"""The look at a pipeline: begin what can begin, and end what has ended.

Each stage is an ordinary job. The row of a stage and its job are written in one transaction, so a stage begins once,
whoever looks and whatever is killed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.database import now
from app.encryption import SecretBox
from app.errors import ServiceError, describe_validation_error
from app.evaluations.service import Evaluations
from app.jobs.service import Jobs
from app.jobs.states import Status
from app.jobs.tables import Job
from app.labellings.service import Labellings
from app.pipelines.tables import Pipeline, PipelineStage
from app.spec.evaluation import EvaluationSpec
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from app.spec.pipeline import PipelineSpec, Stage, references, replaced
from app.spec.schema_base import STORED
from app.webhooks import repository as webhooks

STAGE_FAILED = "stage_failed"


@dataclass(frozen=True)
class Makers:
    """The services that make the jobs of stages."""

    jobs: Jobs
    evaluations: Evaluations
    labellings: Labellings
    secret_box: SecretBox

    def make(self, session: Session, pipeline: Pipeline, stage: Stage, values: dict[str, str]) -> Job:
        """The job of a stage. Raises `ServiceError`, whose `param` is a path in the spec of the stage."""
        try:
            spec = stage.with_values(values)
        except ValidationError as error:
            message, param, code = describe_validation_error(error.errors()[0])
            raise ServiceError(message, param=param, code=code) from None
        if isinstance(spec, JobSpec):
            return self.jobs.add(session, pipeline.project, spec, pipeline.request_id)
        if isinstance(spec, EvaluationSpec):
            return self.evaluations.add(session, pipeline.project, spec, pipeline.request_id)
        return self.labellings.add(session, pipeline.project, spec, pipeline.request_id)


def jobs_of(
    session: Session, pipelines: Sequence[Pipeline], *, only_current: bool = False
) -> dict[str, dict[tuple[int, str], Job]]:
    """The jobs of the stages of each pipeline, by its id, by round and name.

    `only_current`: only those of the round under way.
    """
    found: dict[str, dict[tuple[int, str], Job]] = {pipeline.id: {} for pipeline in pipelines}
    statement = select(PipelineStage, Job).join(Job, Job.id == PipelineStage.job_id)
    if only_current:
        statement = statement.join(Pipeline, Pipeline.id == PipelineStage.pipeline_id)
        statement = statement.where(Pipeline.round == PipelineStage.round)
    for stage, job in session.execute(statement.where(PipelineStage.pipeline_id.in_(found))):
        found[stage.pipeline_id][stage.round, stage.name] = job
    return found


def advance(session: Session, makers: Makers, pipeline: Pipeline) -> bool:
    """Look at a running pipeline, whose row is locked. Returns whether a stage has begun.

    Raises `ServiceError` for a stage that cannot begin; `param` is its path in the spec of the pipeline.
    """
    assert pipeline.sealed_spec is not None
    spec = PipelineSpec.model_validate_json(makers.secret_box.open(pipeline.sealed_spec), context=STORED)
    begun = False
    while pipeline.status == "running" and not pipeline.paused:
        of_round = jobs_of(session, [pipeline], only_current=True)[pipeline.id]
        jobs = {name: job for (_, name), job in of_round.items()}
        broken = next((job for job in jobs.values() if job.status in (Status.FAILED, Status.CANCELLED)), None)
        if broken is not None:
            _break_off(session, pipeline, jobs, broken)
            return begun
        started = _begin_stages(session, makers, pipeline, spec, jobs)
        begun = begun or started
        ended = len(jobs) == len(spec.stages) and all(map(_has_ended, jobs.values()))
        if started or not ended:
            return begun
        _end_round(session, pipeline, spec, jobs)
    return begun


def _begin_stages(
    session: Session, makers: Makers, pipeline: Pipeline, spec: PipelineSpec, jobs: dict[str, Job]
) -> bool:
    """Begin the stages of the round whose inputs are there. `jobs` are those that have begun."""
    values, begun = _values(pipeline, jobs), False
    for number, stage in enumerate(spec.stages):
        needed = {name if output is None else f"{name}.{output}" for _, name, output in references(stage.body)}
        if stage.name in jobs or not needed <= values.keys():
            continue
        try:
            job = makers.make(session, pipeline, stage, values)
        except ServiceError as error:
            error.param = ".".join(["stages", str(number), stage.kind, *([error.param] if error.param else [])])
            raise
        session.add(PipelineStage(pipeline_id=pipeline.id, round=pipeline.round, name=stage.name, job_id=job.id))
        session.flush()
        begun = True
    return begun


def _values(pipeline: Pipeline, jobs: dict[str, Job]) -> dict[str, str]:
    """The values of all references that are known: variables, and outputs of stages that have succeeded."""
    values = dict(pipeline.variables)
    for name, job in jobs.items():
        if not _has_ended(job):
            continue
        values[f"{name}.id"] = job.id
        if job.fine_tuned_model is not None:
            values[f"{name}.model"] = job.fine_tuned_model
        if job.kind == "labelling" and job.result_files:
            values[f"{name}.file"] = job.result_files[0]
    return values


def _has_ended(job: Job) -> bool:
    """Whether a job has succeeded, and all of its gates are judged."""
    return job.status == Status.SUCCEEDED and all(gate["met"] is not None for gate in job.gates or [])


def _end_round(session: Session, pipeline: Pipeline, spec: PipelineSpec, jobs: dict[str, Job]) -> None:
    """Note the result of a round whose stages have all succeeded. Begin the next one, or end the pipeline."""
    model = jobs[spec.model_stage].fine_tuned_model if spec.model_stage is not None else None
    missed = any(gate["met"] is False for job in jobs.values() for gate in job.gates or [])
    result: JsonObject = {"round": pipeline.round, "variables": pipeline.variables, "model": model, "value": None}
    result["gates_met"] = not missed
    if spec.best is not None:
        stage, _, metric = spec.best.metric.partition("/")
        result["value"] = (jobs[stage].metrics or {}).get(metric)
    pipeline.results = [*pipeline.results, result]
    if missed and spec.stop_at_missed_gate and pipeline.round < spec.rounds:
        pipeline.stopped_by = "gate"
    if pipeline.stopped_by is not None or pipeline.round == spec.rounds:
        end(session, pipeline, "succeeded", model=_best(pipeline.results, spec))
        return
    values = _values(pipeline, jobs)
    pipeline.variables = {
        name: variable.first if variable.then is None else replaced(variable.then, values)
        for name, variable in spec.variables.items()
    }  # fmt: skip
    pipeline.round += 1
    session.flush()


def _best(results: list[JsonObject], spec: PipelineSpec) -> str | None:
    """The model of the best round by the metric of the spec, or of the last round without one.

    Only rounds that met all gates count. None if there is none.
    """
    good = [result for result in results if result["gates_met"]]
    if spec.best is not None and (measured := [result for result in good if result["value"] is not None]):
        sign = 1 if spec.best.goal == "max" else -1
        good = [max(measured, key=lambda result: sign * result["value"])]
    model: str | None = good[-1]["model"] if good else None
    return model


def _break_off(session: Session, pipeline: Pipeline, jobs: dict[str, Job], broken: Job) -> None:
    """End a pipeline because a stage has failed or was cancelled. Its other stages run to their ends."""
    name = next(name for name, job in jobs.items() if job is broken)
    if broken.status == Status.CANCELLED:
        end(session, pipeline, "cancelled")
        return
    reason = (broken.error or {}).get("message", "its job says why")
    message = f"The stage '{name}' of round {pipeline.round} has failed: {reason}"
    end(session, pipeline, "failed", error={"code": STAGE_FAILED, "message": message, "param": None})


def end(
    session: Session, pipeline: Pipeline, status: str, model: str | None = None, error: JsonObject | None = None
) -> None:
    """End a pipeline. The keys of its endpoints are forgotten."""
    pipeline.status, pipeline.model, pipeline.error = status, model, error
    pipeline.finished_at, pipeline.sealed_spec = now(session), None
    webhooks.enqueue(session, pipeline.project, f"pipeline.{status}", {"id": pipeline.id, "model": model})
    session.flush()
