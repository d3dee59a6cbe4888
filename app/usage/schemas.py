"""Usage on the wire."""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from app.usage.tables import Usage


class UsageObject(BaseModel):
    """The usage of a project in a month."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "usage",
                "project": "search-team",
                "month": "2026-11",
                "gpu_seconds": 86400.0,
                "trained_tokens": 12000000,
                "storage_bytes": 4000000000,
                "storage_byte_hours": 2.9e12,
            }
        }
    )

    object: Literal["usage"] = "usage"
    project: str
    month: str
    """In UTC."""
    gpu_seconds: float
    """Seconds in which GPU workers ran jobs, evaluations and lost attempts included. A minute late at most."""
    trained_tokens: int
    """Tokens of the trainings that succeeded."""
    storage_bytes: int
    """Bytes stored when they were last measured, which is done each hour."""
    storage_byte_hours: float
    """Bytes stored, times the hours that they were."""

    @classmethod
    def of(cls, usage: "Usage") -> "UsageObject":
        return cls(
            project=usage.project,
            month=usage.month,
            gpu_seconds=usage.gpu_seconds,
            trained_tokens=usage.trained_tokens,
            storage_bytes=usage.storage_bytes,
            storage_byte_hours=usage.storage_byte_hours,
        )
