"""Jobs, events and checkpoints on the wire."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from app.jobs.queue_forecast import QueuePlace
from app.jobs.states import Status
from app.jobs.tables import Checkpoint, Job, JobEvent
from app.spec.datasets.rendering import RenderingSettings
from app.spec.job import KEEP_CHECKPOINTS, Integration
from app.spec.json_types import JsonObject
from app.spec.schema_base import unix_seconds


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class JobHyperparameters(BaseModel):
    """The three hyperparameters of OpenAI's job object. `method` holds all of them."""

    batch_size: int
    learning_rate_multiplier: float
    n_epochs: int


class ActivityProgress(BaseModel):
    """The work of a running job apart from optimizer steps."""

    name: str
    """`fetching`, `placing`, `tokenizing`, `loading`, `reference`, `validating` or `saving`."""
    done: int | None
    """Rows done so far, where rows are counted."""
    total: int | None


class Progress(BaseModel):
    """How far a running job is. `total_steps` is 0 until the rows are counted."""

    step: int
    total_steps: int
    seconds_remaining: float | None
    tokens_per_second: float | None
    activity: ActivityProgress | None = None
    """Null while it makes optimizer steps."""

    @classmethod
    def of(cls, job: Job) -> "Progress | None":
        """The progress of `job`; None before its first attempt."""
        progress = cls(**job.progress) if job.progress else None
        if progress is not None and job.status != Status.RUNNING:
            progress.activity = None
        return progress


class JobEvaluationReference(BaseModel):
    """An evaluation that a training asked for."""

    name: str
    id: str


class GateVerdict(BaseModel):
    """A quality gate with its verdict. `met` is null until the gate's metric is measured."""

    metric: str
    min: float | None
    max: float | None
    value: float | None
    met: bool | None


def shown_gates(job: Job) -> list[GateVerdict]:
    """The gates of a job, with the verdicts so far."""
    unjudged = [gate | {"value": None, "met": None} for gate in job.spec.get("gates") or []]
    return [GateVerdict(**gate) for gate in job.gates or unjudged]


def shown_devices(job: Job) -> int | None:
    """The devices of a job's last attempt, or, while it waits for its first one, the fewest that it takes."""
    return job.least_devices if job.devices is None and job.status == Status.QUEUED else job.devices


class JobObject(BaseModel):
    """OpenAI's `fine_tuning.job` object, and our extensions."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "ftjob-abc123",
                "object": "fine_tuning.job",
                "created_at": 1730000000,
                "model": "meta-llama/Llama-3.1-8B",
                "status": "running",
                "stage": "dpo",
                "training_file": "file-abc123",
                "hyperparameters": {"batch_size": 16, "learning_rate_multiplier": 1.0, "n_epochs": 1},
                "seed": 7,
            }
        }
    )

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_start: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Status
    error: JobError | None
    training_file: str
    more_training_files: list[str] | None
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    hyperparameters: JobHyperparameters
    method: JsonObject
    integrations: list[Integration]
    seed: int
    suffix: str | None
    metadata: dict[str, str] | None

    sft: JsonObject | None
    adapter: JsonObject | str
    quantization: str
    double_quantization: bool | None
    compute_dtype: str | None
    validation_split: float
    mapping: JsonObject | None
    chat_template: bool | None
    fold_system: bool | None
    append_eos: bool | None
    date: str | None
    """The day that the chat template gets. This and the three fields above decide how conversations become text."""
    resources: JsonObject | None
    parallel: JsonObject | None
    priority: int
    timeout_seconds: int | None
    keep_checkpoints: int
    started_at: int | None
    running_seconds: float
    stage: str | None
    progress: Progress | None
    queue_position: int | None
    waiting_for: str | None
    """The need that keeps a queued job waiting, apart from the jobs before it."""
    attempt: int
    devices: int | None
    """The devices of the last attempt. While a job waits for its first one, the fewest that it takes."""
    metrics: dict[str, float] | None
    evaluations: list[JobEvaluationReference]
    """Evaluations of the model that this job makes. Each is a job of its own and waits until this one succeeds."""
    gates: list[GateVerdict]
    sweep_id: str | None
    paused: bool

    @classmethod
    def of(cls, job: Job, place: QueuePlace | None = None) -> "JobObject":
        """The API object of `job`. `place` is its place in the queue or on a worker."""
        spec, place = job.spec, place or QueuePlace()
        method = spec["method"]
        hyperparameters = method[method["type"]]["hyperparameters"]
        return cls(
            id=job.id,
            created_at=int(job.created_at),
            finished_at=unix_seconds(job.finished_at),
            estimated_start=unix_seconds(place.start),
            estimated_finish=unix_seconds(place.finish),
            model=job.model,
            fine_tuned_model=job.fine_tuned_model,
            organization_id=f"org-{job.project}",
            status=Status(job.status),
            error=JobError(**job.error) if job.error else None,
            training_file=job.training_file,
            more_training_files=spec.get("more_training_files"),
            validation_file=job.validation_file,
            result_files=job.result_files,
            trained_tokens=job.trained_tokens,
            hyperparameters=JobHyperparameters(
                **{name: hyperparameters[name] for name in JobHyperparameters.model_fields}
            ),
            method={key: value for key, value in method.items() if value is not None},
            integrations=[Integration(**item) for item in spec.get("integrations") or []],
            seed=spec["seed"],
            suffix=spec["suffix"],
            metadata=job.job_metadata,
            sft=spec["sft"],
            adapter=spec["adapter"],
            quantization=spec["quantization"],
            validation_split=spec["validation_split"],
            mapping=spec.get("mapping"),
            double_quantization=spec.get("double_quantization"),
            compute_dtype=spec.get("compute_dtype"),
            resources=spec.get("resources"),
            parallel=spec.get("parallel"),
            **{name: spec.get(name) for name in RenderingSettings.model_fields},
            priority=job.priority,
            timeout_seconds=job.timeout_seconds,
            keep_checkpoints=spec.get("keep_checkpoints", KEEP_CHECKPOINTS),
            started_at=unix_seconds(job.started_at),
            running_seconds=job.ran_seconds,
            stage=job.stage,
            progress=Progress.of(job),
            queue_position=place.position,
            waiting_for=place.waiting_for,
            attempt=job.attempt,
            devices=shown_devices(job),
            metrics=job.metrics,
            evaluations=[
                JobEvaluationReference(name=name, id=evaluation_id)
                for name, evaluation_id in (job.evaluations or {}).items()
            ],
            gates=shown_gates(job),
            sweep_id=job.sweep_id,
            paused=job.paused,
        )


class EventObject(BaseModel):
    """OpenAI's `fine_tuning.job.event` object."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: JsonObject | None

    @classmethod
    def of(cls, event: JobEvent) -> "EventObject":
        return cls(
            id=event.id,
            created_at=int(event.created_at),
            level=event.level,
            message=event.message,
            type=event.type,
            data=event.data,
        )


class Point(BaseModel):
    """The value of a metric at a step."""

    step: int
    value: float


class MetricSeries(BaseModel):
    """The metrics of a job by step."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "fine_tuning.job.metrics",
                "job_id": "ftjob-abc123",
                "stages": {"sft": 1, "dpo": 101},
                "series": {"loss": [{"step": 101, "value": 0.6931}, {"step": 102, "value": 0.6917}]},
            }
        }
    )

    object: Literal["fine_tuning.job.metrics"] = "fine_tuning.job.metrics"
    job_id: str
    stages: dict[str, int]
    """The first step of each stage."""
    series: dict[str, list[Point]]


class StreamToken(BaseModel):
    """A token that opens a job's stream without a key, within one minute."""

    object: Literal["stream.token"] = "stream.token"
    token: str
    expires_at: int
    url: str


class CheckpointObject(BaseModel):
    """OpenAI's `fine_tuning.job.checkpoint` object."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    step_number: int
    stage: str
    metrics: dict[str, float]
    fine_tuning_job_id: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "CheckpointObject":
        return cls(
            id=checkpoint.id,
            created_at=int(checkpoint.created_at),
            fine_tuned_model_checkpoint=checkpoint.model_name,
            step_number=checkpoint.step_number,
            stage=checkpoint.stage,
            metrics=checkpoint.metrics,
            fine_tuning_job_id=checkpoint.job_id,
        )
