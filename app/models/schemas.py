"""Models on the wire."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from app.models.tables import Model


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
    kind: str
    base_model: str
    fine_tuning_job_id: str | None
    revision: str | None
    details: dict[str, Any]

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


class ModelDeleted(BaseModel):
    """Answer to a DELETE."""

    id: str
    object: Literal["model"] = "model"
    deleted: bool = True
