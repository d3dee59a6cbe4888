"""Estimate a job from its spec, the reports of its files, the present workers, and the pace of earlier jobs."""

import math

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from sqlalchemy.orm import Session

from app.broker import Broker, Lane
from app.database import Database
from app.dataset_reports import service as reports
from app.derived_artifacts.service import result
from app.errors import ServiceError, describe_validation_error
from app.estimates import fit
from app.estimates.memory import SEGMENT_TOKENS, TREE_TOKENS, Memory, MemorySettings, Shape, estimate
from app.estimates.schemas import Estimate, MemoryEstimate, Pace, Refusal, StageEstimate
from app.files import repository as files
from app.jobs import queries
from app.jobs import queue as job_queue
from app.jobs.service import Jobs
from app.jobs.tables import Job
from app.models import repository as models
from app.spec.datasets.check import NEEDED_DATA
from app.spec.datasets.example import Kind
from app.spec.datasets.report import Outline
from app.spec.hyperparameters import DEFAULT_MAX_LENGTH, Hyperparameters, ReinforcementHyperparameters
from app.spec.job import JobSpec, StageSpec
from app.spec.json_types import JsonObject

MAX_PACES = 5
"""Number of earlier jobs whose pace is averaged."""
CHARACTERS_PER_TOKEN = 4
"""A rough average over languages and tokenizers."""


class NotReady(Exception):
    """A worker is still counting a file."""


class Estimates:
    """Estimates of jobs."""

    def __init__(self, database: Database, broker: Broker, jobs: Jobs) -> None:
        self.database, self.broker, self.jobs = database, broker, jobs

    def estimate(self, project: str, body: JsonObject) -> Estimate | None:
        """The estimate of the job `body`; None while its files are being counted. Nothing is run."""
        try:
            spec = JobSpec.model_validate(body)
        except ValidationError as error:
            errors: list[ErrorDetails] = [{**entry, "loc": ("body", *entry["loc"])} for entry in error.errors()]
            reasons = [describe_validation_error(entry) for entry in errors]
            refusals = [Refusal(message=message, param=param, code=code) for message, param, code in reasons]
            return Estimate(ok=False, refused=refusals)
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
        shape = fit.shape_of(session, project, spec, model.base_model)
        devices = fit.devices_of(session, model.base_model, spec.resources.nodes)
        device = fit.largest(devices)
        context = shape.context if shape is not None else DEFAULT_MAX_LENGTH
        paces = {
            writes: _shown_pace(session, model.base_model, project, writes=writes)
            for writes in {stage.writes for stage in spec.stages()}
        }
        counts = [
            _merge_counts(
                [
                    self._count_tokens(session, project, spec, model, field, stage.settings, context)
                    for field in spec.training_fields(stage.file_field)
                ]
            )
            for stage in spec.stages()
        ]
        longest = max(counted["longest_row"] for counted in counts)
        if shape is not None:
            spec = fit.placed(spec, shape, devices, longest)
            device = fit.largest(fit.wide_enough(devices, spec) or devices)
        stages, memories = [], []
        for stage_spec, counted in zip(spec.stages(), counts, strict=True):
            stage, settings = _stage(stage_spec, counted, paces[stage_spec.writes], spec), stage_spec.settings
            stages.append(stage)
            if shape is not None:
                memory_settings = MemorySettings.of(spec, settings, stage.tokens_per_row, stage.longest_row)
                kind = device.kind if device is not None else "cuda"
                memories.append(estimate(shape, memory_settings, kind, None if device is None else device.memory_bytes))
        memory = max(memories, key=lambda stage_memory: stage_memory.total, default=None)
        pace = paces[spec.stages()[-1].writes]
        estimated = Estimate(
            ok=True,
            stages=stages,
            memory=memory and MemoryEstimate(**_memory_fields(memory)),
            device=device,
            devices=spec.resources.least,
            fits=None if memory is None or device is None else memory.total <= device.memory_bytes,
            pace=pace,
            seconds=_seconds(pace, stages),
            queued_jobs=job_queue.count_waiting(session, 1000, project),
        )
        estimated.warnings = _warnings(spec, estimated, shape)
        if shape is not None:
            reason = fit.refusal(spec, shape, devices, longest)
            if reason is not None:
                estimated.ok, estimated.refused = False, [Refusal(message=reason[1], param=reason[0], code=fit.CODE)]
        return estimated

    def _count_tokens(
        self,
        session: Session,
        project: str,
        spec: JobSpec,
        model: models.ResolvedModel,
        field: str,
        settings: Hyperparameters,
        context: int,
    ) -> JsonObject:
        """Token counts of the file that `field` names. Raises `NotReady` or `ServiceError`."""
        file_id = dict(spec.files())[field]
        file = files.get(session, project, file_id)
        assert file is not None
        mapping = spec.reads(field)
        arguments: JsonObject = {
            "model": spec.model,
            "max_length": min(settings.max_length or DEFAULT_MAX_LENGTH, context),
            "method": settings.METHOD,
            "need": settings.data.value,
            "loss_on": settings.scored,
            "mapping": None if mapping is None else mapping.model_dump(mode="json"),
            "rendering": spec.undated,
            "truncation": settings.truncation,
            **({} if settings.pair_rule.takes_all else {"pairs": vars(settings.pair_rule)}),
        }
        report = reports.structural_report(session, project, file_id)
        if report.status == "pending":
            session.commit()  # keeps the request for the report
            raise NotReady
        if file.mapping == arguments["mapping"]:  # the report read the file as the job would
            _require(report.result or {}, Kind(arguments["need"]), field)
        token_report = result(session, reports.token_report(session, file, arguments, model), field)
        if token_report is None:
            session.commit()
            raise NotReady
        _require(token_report, Kind(arguments["need"]), field)
        counted: JsonObject = token_report["tokens"]
        if isinstance(settings, ReinforcementHyperparameters):  # the answers are written in training
            room = max(1, arguments["max_length"] - settings.max_tokens)
            longest, mean = (min(room, counted["lengths"]["prompt"][name]) for name in ("max", "mean"))
            answers, together = settings.answers * settings.max_tokens, 2 if settings.algorithm == "online_dpo" else 1
            tree = max(longest + together * settings.max_tokens, min(longest + answers, TREE_TOKENS))
            counted |= {"tokens_per_row": mean + answers, "longest_row": tree}
        if arguments["need"] == Kind.LABELLED:  # KTO also computes each prompt with the answer of another row
            answers = counted["lengths"]["answer"]
            counted |= {
                "tokens_per_row": counted["tokens_per_row"] + answers["mean"],
                "longest_row": counted["longest_row"] + answers["max"],
            }
        return counted


def _require(report: JsonObject, need: Kind, field: str) -> None:
    """Refuse a file that the method cannot train on, as the file check of a job does. Raises `ServiceError`."""
    code = f"invalid_{field.removeprefix('sft.')}" if field.endswith("_file") else "invalid_training_file"
    if report.get("error"):
        raise ServiceError(report["error"]["message"], param=field, code=code)
    if not report.get("valid"):
        raise ServiceError("No row of the file is left to train on. Its report says why.", param=field, code=code)
    if not Kind(report["kind"]).serves(need):
        message = f"The method needs {NEEDED_DATA[need]}. This file is {report['format']} ({report['kind']})."
        raise ServiceError(message, param=field, code=code)


def _merge_counts(counts: list[JsonObject]) -> JsonObject:
    """The counts of several files as if they were one."""
    rows = sum(count["rows"] for count in counts)

    def mean(name: str) -> float:
        return sum(float(count[name]) * int(count["rows"]) for count in counts) / max(1, int(rows))

    return {
        "rows": rows,
        "examples": sum(count["examples"] for count in counts),
        "tokens_per_row": mean("tokens_per_row"),
        "truncated_share": mean("truncated_share"),
        "longest_row": max(count["longest_row"] for count in counts),
    }


def _stage(stage: StageSpec, counted: JsonObject, pace: Pace | None, spec: JobSpec) -> StageEstimate:
    """Rows, steps, tokens and seconds of a stage. The steps are counted as in worker/trainer/plan.py.

    The seconds are those of the fewest devices that the job starts with.
    """
    settings, examples = stage.settings, max(1, counted["examples"])
    split = 0.0 if stage.validation is not None else stage.validation_split
    held_out = round(min(round(split * examples), examples - 1) * counted["rows"] / examples)
    rows = counted["rows"] - held_out
    batch = min(settings.batch_size or 16, max(1, rows))
    steps = settings.max_steps or math.ceil(rows * (settings.n_epochs or 1) / batch) * settings.repeats
    tokens = round(steps * batch * counted["tokens_per_row"])
    faster = speedup(spec, spec.resources.least, tokens / max(1, steps))
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
        seconds=None if pace is None else tokens / (pace.tokens_per_second * faster),
    )


def _seconds(pace: Pace | None, stages: list[StageEstimate]) -> float | None:
    """Seconds of a job from its start to its end. `pace` is that of its last stage. None if a stage has no pace."""
    parts = [stage.seconds for stage in stages]
    if pace is None or None in parts:
        return None
    return pace.overhead_seconds + sum(part for part in parts if part is not None)


def speedup(spec: JobSpec, devices: int, step_tokens: float) -> float:
    """The speed of a training on so many devices, relative to that on one, for steps of so many tokens.

    A step is dealt to the devices in virtual ranks of about equal size. Where they do not divide evenly, some devices
    idle. The traffic between devices overlaps with the work (bench/scaling.py), and does not count.
    """
    segments = math.ceil(step_tokens / SEGMENT_TOKENS)
    parts = max(1, min(segments, devices if spec.adapter == "none" else spec.parallel.virtual_ranks))
    return parts / math.ceil(parts / devices)


def _shown_pace(session: Session, base_model: str, project: str, *, writes: bool) -> Pace | None:
    """The pace that a project may see: that of its own last jobs, else roughly that of the machines.

    It does not tell what other projects do. `writes`: of stages in which the model writes answers.
    """
    own = _pace(session, base_model, project, writes=writes)
    if own is not None:
        return own
    pace = _pace(session, base_model, writes=writes)
    if pace is None:
        return None
    return Pace(
        tokens_per_second=_roughly(pace.tokens_per_second), overhead_seconds=_roughly(pace.overhead_seconds), jobs=0
    )


def _roughly(value: float) -> float:
    """A number with one significant digit."""
    return float(f"{value:.0e}")


def _pace(session: Session, base_model: str, project: str | None = None, *, writes: bool) -> Pace | None:
    """The pace of the last jobs on a base model, of a project or of all, with their mean overhead; None without any.

    `writes`: of stages in which the model writes answers, else of the others.
    """
    jobs = [
        job
        for job in queries.paces(session, base_model, MAX_PACES, writes=writes)
        if job.pace and job.pace["seconds"] > 0 and project in (None, job.project)
    ]
    measured = [job.pace for job in jobs if job.pace]
    tokens = sum(pace["tokens"] for pace in measured)
    if not tokens:
        return None
    seconds = sum(_speedup_of(job) * job.pace["seconds"] for job in jobs if job.pace)
    overhead = sum(pace["overhead_seconds"] for pace in measured) / len(measured)
    return Pace(tokens_per_second=tokens / seconds, overhead_seconds=overhead, jobs=len(measured))


def _speedup_of(job: Job) -> float:
    """The speed of a measured job, relative to that on one device."""
    devices, steps = job.devices or 1, (job.pace or {}).get("steps")
    if devices == 1 or not steps or job.pace is None:
        return devices
    return speedup(JobSpec.stored(job.spec), devices, job.pace["tokens"] / steps)


def expected_seconds(session: Session, spec: JobSpec, base_model: str, outlines: dict[str, Outline]) -> float | None:
    """Roughly how long a resolved job will train, from the characters of its files; None if no pace is known.

    `outlines` has each file by field. The queue forecast uses the result until the job runs.
    """
    pace, stages = None, []
    for stage in spec.stages():
        pace = _pace(session, base_model, writes=stage.writes)
        trained = [outlines[field] for field in spec.training_fields(stage.file_field)]
        rows, settings = sum(file.kept for file in trained), stage.settings
        characters = sum(file.prompts for file in trained)
        if not stage.writes:
            pairs = settings.data != Kind.SUPERVISED
            characters += sum(file.best + (file.worst if pairs else 0) for file in trained)
        tokens = characters / CHARACTERS_PER_TOKEN / max(1, rows)
        if isinstance(settings, ReinforcementHyperparameters):
            tokens += settings.answers * settings.max_tokens
        counted = {"rows": rows, "examples": rows, "tokens_per_row": tokens}
        stages.append(_stage(stage, counted | {"longest_row": 0, "truncated_share": 0.0}, pace, spec))
    return _seconds(pace, stages)


def needs(session: Session, project: str, spec: JobSpec, base_model: str, outlines: dict[str, Outline]) -> JsonObject:
    """The columns of a resolved job that say what it needs: devices, their memory, and seconds.

    All are rough, from the characters of its files. The memory is None if the sizes of the base model are not known. A
    worker whose devices have less does not claim the job.
    """
    longest_rows = {}
    for stage in spec.stages():
        longest = max(outlines[field].longest for field in spec.training_fields(stage.file_field))
        allowed = stage.settings.max_length or DEFAULT_MAX_LENGTH
        longest_rows[stage.name] = min(allowed, longest // CHARACTERS_PER_TOKEN)
    shape, memory = fit.shape_of(session, project, spec, base_model), None
    if shape is not None:
        longest = max(fit.SHORTEST_ROW, *longest_rows.values())
        spec = fit.placed(spec, shape, fit.devices_of(session, base_model, spec.resources.nodes), longest)
        memory = fit.least_memory(spec, shape, fit.devices_of(session, base_model), longest_rows)
    return {
        "least_devices": spec.resources.least,
        "most_devices": spec.resources.most,
        "memory_bytes": memory,
        "estimated_seconds": expected_seconds(session, spec, base_model, outlines),
    }


def _memory_fields(memory: Memory) -> JsonObject:
    """The fields of `MemoryEstimate`."""
    by_purpose = {name: value for name, value in vars(memory).items() if name != "recompute"}
    return by_purpose | {"total": memory.total, "recompute_activations": memory.recompute}


def _warnings(spec: JobSpec, estimated: Estimate, shape: Shape | None) -> list[str]:
    warnings = []
    if estimated.device is None:
        warnings.append(f"No present worker serves '{spec.model}'. The job would wait for one.")
    if shape is None:
        warnings.append("Memory cannot be estimated: no worker has registered the sizes of this model yet.")
    untimed = next((stage.name for stage in estimated.stages if stage.seconds is None), None)
    if untimed is not None:
        kind = "reinforcement" if untimed == ReinforcementHyperparameters.STAGE else "job"
        warnings.append(f"Time cannot be estimated: no {kind} on this base model has succeeded here yet.")
    for stage in estimated.stages:
        if stage.truncated_share > 0.01:
            warnings.append(f"'max_length' cuts or drops {stage.truncated_share:.0%} of rows in stage {stage.name}.")
        if stage.steps < 10:
            warnings.append(
                f"Stage {stage.name} has only {stage.steps} steps. A smaller 'batch_size' or more epochs give more."
            )
    if estimated.memory is not None and estimated.memory.recompute_activations:
        warnings.append("Activations would be recomputed in the backward pass, because otherwise they would not fit.")
    if estimated.seconds is not None and spec.timeout_seconds is not None and estimated.seconds > spec.timeout_seconds:
        warnings.append("The job would not finish within its 'timeout_seconds'.")
    return warnings
