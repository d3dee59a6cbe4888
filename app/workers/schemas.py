"""Workers on the wire."""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from app.spec.json_types import JsonObject
from app.spec.schema_base import Strict

if TYPE_CHECKING:
    from app.workers.tables import Worker


class WorkerChange(Strict):
    """The body of `POST /v1/workers/{name}`."""

    model_config = ConfigDict(json_schema_extra={"example": {"cordoned": True}})

    cordoned: bool


class WorkerObject(BaseModel):
    """A worker that has reported in the last 90 seconds."""

    id: str
    object: Literal["worker"] = "worker"
    lane: str
    cordoned: bool
    """Whether it starts no jobs because an operator wants it so. A job that it runs goes on."""
    serves: list[str]
    """Names of base models, or patterns of hub ids."""
    last_seen_at: int
    details: JsonObject
    """Its `device`, the free space of its disk, the use of its GPU, and why it is out of service, if it is."""

    @classmethod
    def of(cls, worker: "Worker") -> "WorkerObject":
        return cls(
            id=worker.name,
            lane=worker.lane,
            cordoned=worker.cordoned,
            serves=worker.serves,
            last_seen_at=int(worker.seen_at),
            details=worker.details,
        )
