"""Estimates on the wire."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Refusal(BaseModel):
    """What a create of this job would refuse."""

    message: str
    param: str | None
    code: str | None


class StageEstimate(BaseModel):
    """A stage of the job. `tokens` are those trained on in all epochs, a shared prompt once."""

    name: str
    """sft or dpo."""
    rows: int
    validation_rows: int
    batch_size: int
    steps: int
    tokens: int
    tokens_per_row: float
    longest_row: int
    truncated_share: float
    seconds: float | None


class MemoryEstimate(BaseModel):
    """Bytes on the device at the peak, by what they are for."""

    model: int
    adapter: int
    optimizer: int
    activations: int
    temporary: int
    runtime: int
    total: int
    recompute_activations: bool


class Device(BaseModel):
    """What the job would run on: of the workers that serve the model, the one with the most memory."""

    kind: str
    name: str
    memory_bytes: int


class Pace(BaseModel):
    """What jobs on this base model measured here lately."""

    tokens_per_second: float
    overhead_seconds: float
    jobs: int


class Estimate(BaseModel):
    """What a job would take. With something in `refused`, the rest may be missing: a create would refuse the job."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "object": "fine_tuning.estimate",
                "ok": True,
                "stages": [
                    {
                        "name": "dpo",
                        "rows": 950,
                        "validation_rows": 50,
                        "batch_size": 16,
                        "steps": 60,
                        "tokens": 411000,
                        "tokens_per_row": 432.6,
                        "longest_row": 2048,
                        "truncated_share": 0.01,
                        "seconds": 41.0,
                    }
                ],
                "memory": None,
                "device": None,
                "fits": None,
                "pace": None,
                "seconds": None,
                "queued_jobs": 0,
                "refused": [],
                "warnings": [],
            }
        }
    )

    object: Literal["fine_tuning.estimate"] = "fine_tuning.estimate"
    ok: bool
    """Whether a create would be accepted."""
    stages: list[StageEstimate] = []
    memory: MemoryEstimate | None = None
    device: Device | None = None
    fits: bool | None = None
    pace: Pace | None = None
    seconds: float | None = None
    """From the first claim to the end, the queue not counted."""
    queued_jobs: int = 0
    refused: list[Refusal] = []
    warnings: list[str] = []
