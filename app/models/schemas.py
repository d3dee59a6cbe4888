"""Models on the wire."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from app.jobs.tables import Job
from app.models.tables import Model
from app.spec.json_types import JsonObject
from app.spec.schema_base import unix_seconds


class ModelObject(BaseModel):
    """OpenAI's `model` object, and our extensions."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "ft:stories260K:default:support:a1b2c3d4",
                "object": "model",
                "created": 1730000000,
                "owned_by": "default",
                "kind": "adapter",
                "base_model": "stories260K",
            }
        }
    )

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    shutdown_date: str | None = None
    """A field of OpenAI's contract. It is always null here."""
    kind: str
    base_model: str
    fine_tuning_job_id: str | None
    revision: str | None
    details: JsonObject

    @classmethod
    def of(cls, model: Model) -> "ModelObject":
        return cls(
            id=model.name,
            created=int(model.created_at),
            owned_by=model.project or "system",
            kind=model.kind,
            base_model=model.base_model,
            fine_tuning_job_id=model.job_id,
            revision=model.revision,
            details=model.details,
        )


class LineageStep(BaseModel):
    """A job in the lineage: its start model, files, spec and metrics, and the model that it made."""

    model: str
    started_from: str
    job: str
    method: str
    sft: bool
    files: dict[str, str | None]
    """SHA-256 by file id. It is null if the file is gone."""
    spec: JsonObject
    metrics: dict[str, float]
    finished_at: int | None

    @classmethod
    def of(cls, name: str, job: Job, files: dict[str, str | None]) -> "LineageStep":
        return cls(
            model=name,
            started_from=job.model,
            job=job.id,
            method=job.spec["method"]["type"],
            sft=job.spec["sft"] is not None,
            files=files,
            spec=job.spec,
            metrics=job.metrics or {},
            finished_at=unix_seconds(job.finished_at),
        )


class Lineage(BaseModel):
    """How a model was made, starting from its base model."""

    model: str
    object: Literal["model.lineage"] = "model.lineage"
    base_model: str
    base_revision: str | None
    steps: list[LineageStep]


class ModelDeleted(BaseModel):
    """Answer to a DELETE."""

    id: str
    object: Literal["model"] = "model"
    deleted: bool = True
