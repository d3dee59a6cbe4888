"""Evaluations on the wire."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from app.jobs.queue_forecast import QueuePlace
from app.jobs.schemas import GateVerdict, JobError, shown_devices, shown_gates
from app.jobs.states import Status
from app.jobs.tables import Job
from app.spec.evaluation import EvaluationType
from app.spec.json_types import JsonObject
from app.spec.schema_base import unix_seconds, without_nulls


class EvaluationProgress(BaseModel):
    """How far a running evaluation is."""

    completions: int
    total: int
    answers: int | None = None
    """The number of `questions` that the judge's endpoint has answered."""
    questions: int | None = None


class EvaluationObject(BaseModel):
    """An evaluation. It has `metrics` once it has succeeded."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "eval-abc123",
                "object": "evaluation",
                "created_at": 1730000000,
                "status": "succeeded",
                "type": "preference",
                "data": "file-abc123",
                "candidate": {"model": "ft:meta-llama/Llama-3.1-8B:default:support:1a2b3c4d"},
                "baseline": {"model": "meta-llama/Llama-3.1-8B"},
                "metrics": {"accuracy": 0.71, "accuracy/low": 0.68, "accuracy/high": 0.74},
                "result_files": ["file-report", "file-items"],
            }
        }
    )

    id: str
    object: Literal["evaluation"] = "evaluation"
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_start: int | None
    estimated_finish: int | None
    organization_id: str
    status: Status
    error: JobError | None
    type: EvaluationType
    name: str | None
    data: str
    mapping: JsonObject | None
    max_rows: int | None
    candidate: JsonObject | None
    baseline: JsonObject | None
    beta: float | None
    sampling: JsonObject | None
    judge: JsonObject | None
    quantization: str
    max_length: int | None
    seed: int
    metadata: dict[str, str] | None
    resources: JsonObject | None
    devices: int | None
    """The devices of the last attempt. While an evaluation waits for its first one, the fewest that it takes."""
    priority: int
    timeout_seconds: int | None
    running_seconds: float
    progress: EvaluationProgress | None
    queue_position: int | None
    waiting_for: str | None
    """The need that keeps a queued job waiting, apart from the jobs before it."""
    attempt: int
    metrics: dict[str, float] | None
    gates: list[GateVerdict]
    fine_tuning_job_id: str | None
    """The training that asked for this evaluation, if one did. That training has the gates."""
    sweep_id: str | None
    result_files: list[str]
    """The report, as JSON, and the items behind it: one line for each pair or completion."""
    paused: bool

    @classmethod
    def of(cls, job: Job, place: QueuePlace | None = None) -> "EvaluationObject":
        """The API object of the row `job`. `place` is its place in the queue or on a worker."""
        spec, place = job.spec, place or QueuePlace()
        copied = (
            "type",
            "name",
            "data",
            "mapping",
            "max_rows",
            "beta",
            "sampling",
            "quantization",
            "max_length",
            "seed",
        )
        return cls(
            id=job.id,
            created_at=int(job.created_at),
            started_at=unix_seconds(job.started_at),
            finished_at=unix_seconds(job.finished_at),
            estimated_start=unix_seconds(place.start),
            estimated_finish=unix_seconds(place.finish),
            organization_id=f"org-{job.project}",
            resources=spec.get("resources"),
            devices=shown_devices(job),
            status=Status(job.status),
            error=JobError(**job.error) if job.error else None,
            candidate=without_nulls(spec["candidate"]),
            baseline=without_nulls(spec["baseline"]),
            judge=_shown_judge(spec["judge"]),
            metadata=job.job_metadata,
            priority=job.priority,
            timeout_seconds=job.timeout_seconds,
            running_seconds=job.ran_seconds,
            progress=EvaluationProgress(**job.progress) if job.progress else None,
            queue_position=place.position,
            waiting_for=place.waiting_for,
            attempt=job.attempt,
            metrics=job.metrics,
            gates=shown_gates(job),
            fine_tuning_job_id=job.parent_id,
            sweep_id=job.sweep_id,
            result_files=job.result_files,
            paused=job.paused,
            **{name: spec[name] for name in copied},
        )


def _shown_judge(stored_judge: JsonObject | None) -> JsonObject | None:
    """The judge without the API key of its endpoint, which the API never shows."""
    judge = without_nulls(stored_judge)
    if judge is not None and "endpoint" in judge:
        judge["endpoint"] = without_nulls({**judge["endpoint"], "api_key": None})
    return judge
