"""Estimate a job from its spec, the reports of its files, the workers that are there, and what jobs measured here."""

import math
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from app.broker import Broker, Lane
from app.database import Database
from app.dataset_reports import service as reports
from app.derived_artifacts.service import result
from app.errors import ServiceError, describe_validation_error
from app.estimates import fit
from app.estimates.memory import Memory, MemorySettings, Shape, estimate
from app.estimates.schemas import Estimate, MemoryEstimate, Pace, Refusal, StageEstimate
from app.files import repository as files
from app.jobs import queries
from app.jobs import queue as job_queue
from app.jobs.service import Jobs
from app.models import repository as models
from app.spec.datasets.check import NEEDS
from app.spec.datasets.example import Kind
from app.spec.datasets.report import Report
from app.spec.hyperparameters import DEFAULT_MAX_LENGTH, Hyperparameters
from app.spec.job import JobSpec, StageSpec

MAX_PACES = 5
CHARACTERS = 4
"""Of a token, on average over languages and tokenizers."""


class NotReady(Exception):
    """A worker still counts something."""


class Estimates:
    """Estimates of jobs."""

    def __init__(self, database: Database, broker: Broker, jobs: Jobs) -> None:
        self.database, self.broker, self.jobs = database, broker, jobs

    def estimate(self, project: str, body: dict[str, Any]) -> Estimate | None:
        """What the job of `body` would take; None while its files are being counted. Nothing is run."""
        try:
            spec = JobSpec.model_validate(body)
        except ValidationError as error:
            found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
            told = [describe_validation_error(one) for one in found]
            return Estimate(ok=False, refused=[Refusal(message=m, param=p, code=c) for m, p, c in told])
        try:
            with self.database.write() as session:
                return self._estimate(session, project, spec)
        except ServiceError as error:
            refused = Refusal(message=error.message, param=error.param, code=error.code)
            return Estimate(ok=False, refused=[refused])
        except NotReady:
            self.broker.wake(Lane.CPU)
            return None

    def _estimate(self, session: Session, project: str, spec: JobSpec) -> Estimate:
        model, _, spec = self.jobs.prepare(session, project, spec)
        shape, device = fit.shape_of(session, model), fit.device_of(session, model)
        context = shape.context if shape is not None else DEFAULT_MAX_LENGTH
        pace = _pace(session, model.base_model)
        stages, memories = [], []
        for asked in spec.stages():
            fields = spec.trained(asked.file_field)
            counted = _together(
                [self._counted(session, project, spec, model, field, asked.settings, context) for field in fields]
            )
            stage = _stage(asked, counted, pace)
            stages.append(stage)
            if shape is not None:
                wanted = MemorySettings.of(spec, asked.settings, stage.tokens_per_row, stage.longest_row)
                kind = device.kind if device is not None else "cuda"
                memories.append(estimate(shape, wanted, kind, None if device is None else device.memory_bytes))
        memory = max(memories, key=lambda found: found.total, default=None)
        seconds = None
        if pace is not None:
            seconds = pace.overhead_seconds + sum(stage.seconds or 0.0 for stage in stages)
        found = Estimate(
            ok=True,
            stages=stages,
            memory=memory and MemoryEstimate(**_parts(memory)),
            device=device,
            fits=None if memory is None or device is None else memory.total <= device.memory_bytes,
            pace=pace,
            seconds=seconds,
            queued_jobs=len(job_queue.waiting(session, 1000)),
        )
        found.warnings = _warnings(spec, found, shape)
        if shape is not None and device is not None:
            longest = max(stage.longest_row for stage in stages)
            reason = fit.refusal(spec, shape, device, longest)
            if reason is not None:
                found.ok, found.refused = False, [Refusal(message=reason[1], param=reason[0], code=fit.CODE)]
        return found

    def _counted(
        self,
        session: Session,
        project: str,
        spec: JobSpec,
        model: models.ResolvedModel,
        field: str,
        settings: Hyperparameters,
        context: int,
    ) -> dict[str, Any]:
        """The report in tokens of the file of `field`. Raises `NotReady` or `ServiceError`."""
        file_id = dict(spec.files())[field]
        file = files.get(session, project, file_id)
        assert file is not None
        mapping = spec.reads(field)
        asked: dict[str, Any] = {
            "model": spec.model,
            "max_length": min(settings.max_length or DEFAULT_MAX_LENGTH, context),
            "method": settings.METHOD,
            "need": settings.data.value,
            "loss_on": settings.scored,
            "mapping": None if mapping is None else mapping.model_dump(mode="json"),
            "rendering": spec.undated,
            "truncation": settings.truncation,
        }
        structural = reports.structural(session, project, file_id)
        if structural.status == "pending":
            session.commit()
            raise NotReady
        found = structural.result or {}
        if file.mapping == asked["mapping"]:  # read as it would be by the job
            _require(found, Kind(asked["need"]), field)
        task = reports.with_tokens(session, file, asked, model)
        made = result(task, field)
        if made is None:
            session.commit()
            raise NotReady
        _require(made, Kind(asked["need"]), field)
        counted: dict[str, Any] = made["tokens"]
        if asked["need"] == Kind.LABELLED:  # KTO computes each row with another's answer too
            answers = counted["lengths"]["answer"]
            counted |= {
                "tokens_per_row": counted["tokens_per_row"] + answers["mean"],
                "longest_row": counted["longest_row"] + answers["max"],
            }
        return counted


def _require(report: dict[str, Any], need: Kind, field: str) -> None:
    """Refuse a file that the method cannot train on, as the file check of a job would."""
    code = f"invalid_{field.removeprefix('sft.')}" if field.endswith("_file") else "invalid_training_file"
    if report.get("error"):
        raise ServiceError(report["error"]["message"], param=field, code=code)
    if not report.get("valid"):
        raise ServiceError("No row of the file is left to train on; its report says why.", param=field, code=code)
    if not Kind(report["kind"]).serves(need):
        message = f"The method needs {NEEDS[need]}; this is {report['format']} ({report['kind']})."
        raise ServiceError(message, param=field, code=code)


def _together(counted: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of several files as if they were one."""
    rows = sum(one["rows"] for one in counted)

    def mean(name: str) -> float:
        return sum(float(one[name]) * int(one["rows"]) for one in counted) / max(1, int(rows))

    return {
        "rows": rows,
        "examples": sum(one["examples"] for one in counted),
        "tokens_per_row": mean("tokens_per_row"),
        "truncated_share": mean("truncated_share"),
        "longest_row": max(one["longest_row"] for one in counted),
    }


def _stage(stage: StageSpec, counted: dict[str, Any], pace: Pace | None) -> StageEstimate:
    """The steps that the engine will take, as worker/trainer/plan.py counts them."""
    settings, examples = stage.settings, max(1, counted["examples"])
    split = 0.0 if stage.validation is not None else stage.validation_split
    held_out = round(min(round(split * examples), examples - 1) * counted["rows"] / examples)
    rows = counted["rows"] - held_out
    batch = min(settings.batch_size or 16, max(1, rows))
    steps = settings.max_steps or math.ceil(rows * (settings.n_epochs or 1) / batch)
    tokens = round(steps * batch * counted["tokens_per_row"])
    return StageEstimate(
        name=stage.name,
        rows=rows,
        validation_rows=held_out,
        batch_size=batch,
        steps=steps,
        tokens=tokens,
        tokens_per_row=counted["tokens_per_row"],
        longest_row=counted["longest_row"],
        truncated_share=counted["truncated_share"],
        seconds=None if pace is None else tokens / pace.tokens_per_second,
    )


def _pace(session: Session, base_model: str) -> Pace | None:
    """What the last jobs on the base model measured, weighted by their tokens."""
    measured = [
        job.pace for job in queries.paces(session, base_model, MAX_PACES) if job.pace and job.pace["seconds"] > 0
    ]
    tokens, seconds = sum(one["tokens"] for one in measured), sum(one["seconds"] for one in measured)
    if not tokens:
        return None
    overhead = sum(one["overhead_seconds"] for one in measured) / len(measured)
    return Pace(tokens_per_second=tokens / seconds, overhead_seconds=overhead, jobs=len(measured))


def expected_seconds(session: Session, spec: JobSpec, base_model: str, found: dict[str, Report]) -> float | None:
    """Roughly how long a resolved job will train, from the characters of its files; None where no job has told yet.

    It is for the place in the queue: a running job measures what is left.
    """
    pace = _pace(session, base_model)
    if pace is None:
        return None
    seconds = pace.overhead_seconds
    for stage in spec.stages():
        reports = [found[field] for field in spec.trained(stage.file_field)]
        kept, compares = sum(one.kept for one in reports), stage.settings.data != Kind.SUPERVISED
        characters = sum(one.prompts.total + one.best.total + (one.worst.total if compares else 0) for one in reports)
        counted = {"rows": kept, "examples": kept, "tokens_per_row": characters / CHARACTERS / max(1, kept)}
        seconds += _stage(stage, counted | {"longest_row": 0, "truncated_share": 0.0}, pace).seconds or 0.0
    return seconds


def _parts(memory: Memory) -> dict[str, Any]:
    parts = {name: value for name, value in vars(memory).items() if name != "recompute"}
    return parts | {"total": memory.total, "recompute_activations": memory.recompute}


def _warnings(spec: JobSpec, found: Estimate, shape: Shape | None) -> list[str]:
    said = []
    if found.device is None:
        said.append(f"No worker that serves '{spec.model}' is there now; the job would wait for one.")
    if shape is None:
        said.append("The model's sizes are not known before a worker has it: memory cannot be told.")
    if found.pace is None:
        said.append("No job on this base model has ended here yet: time cannot be told.")
    for stage in found.stages:
        if stage.truncated_share > 0.01:
            said.append(f"{stage.truncated_share:.0%} of the rows of stage {stage.name} are cut by 'max_length'.")
        if stage.steps < 10:
            said.append(f"Stage {stage.name} has {stage.steps} steps; a smaller 'batch_size' or more epochs make more.")
    if found.memory is not None and found.memory.recompute_activations:
        said.append("Activations would be recomputed in the backward pass: they would not fit otherwise.")
    if found.seconds is not None and spec.timeout_seconds is not None and found.seconds > spec.timeout_seconds:
        said.append("The job would not be done within its 'timeout_seconds'.")
    return said
