"""Jobs, events and checkpoints on the wire."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from app.jobs.states import Status
from app.jobs.tables import Checkpoint, Job, JobEvent


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class JobHyperparameters(BaseModel):
    """The contract's three; the method holds them all."""

    batch_size: int
    learning_rate_multiplier: float
    n_epochs: int


class Progress(BaseModel):
    """How far a running job is."""

    step: int
    total_steps: int
    seconds_remaining: float | None
    tokens_per_second: float | None


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
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Status
    error: JobError | None
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    hyperparameters: JobHyperparameters
    method: dict[str, Any]
    integrations: list[Any]
    seed: int
    suffix: str | None
    metadata: dict[str, str] | None

    sft: dict[str, Any] | None
    adapter: dict[str, Any] | str
    quantization: str
    validation_split: float
    priority: int
    stage: str | None
    progress: Progress | None
    queue_position: int | None
    attempt: int
    metrics: dict[str, float] | None
    gates: list[Any]
    paused: bool

    @classmethod
    def of(cls, job: Job, queue_position: int | None, now: float) -> "JobObject":
        """The object for `job`; `now` is the database's clock."""
        spec = job.spec
        method = spec["method"]
        hyperparameters = method[method["type"]]["hyperparameters"]
        progress = Progress(**job.progress) if job.progress else None
        finish = None
        if progress is not None and progress.seconds_remaining is not None:
            finish = int(now + progress.seconds_remaining)
        return cls(
            id=job.id,
            created_at=int(job.created_at),
            finished_at=None if job.finished_at is None else int(job.finished_at),
            estimated_finish=finish,
            model=job.model,
            fine_tuned_model=job.fine_tuned_model,
            organization_id=f"org-{job.project}",
            status=Status(job.status),
            error=JobError(**job.error) if job.error else None,
            training_file=job.training_file,
            validation_file=job.validation_file,
            result_files=job.result_files,
            trained_tokens=job.trained_tokens,
            hyperparameters=JobHyperparameters(
                **{name: hyperparameters[name] for name in JobHyperparameters.model_fields}
            ),
            method={key: value for key, value in method.items() if value is not None},
            integrations=[],
            seed=spec["seed"],
            suffix=spec["suffix"],
            metadata=job.job_metadata,
            sft=spec["sft"],
            adapter=spec["adapter"],
            quantization=spec["quantization"],
            validation_split=spec["validation_split"],
            priority=job.priority,
            stage=job.stage,
            progress=progress,
            queue_position=queue_position,
            attempt=job.attempt,
            metrics=job.metrics,
            gates=[],
            paused=False,
        )


class EventObject(BaseModel):
    """OpenAI's `fine_tuning.job.event` object."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None

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
