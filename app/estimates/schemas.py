"""Estimates on the wire."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Refusal(BaseModel):
    """A reason for which a create would refuse this job."""

    message: str
    param: str | None
    code: str | None


class StageEstimate(BaseModel):
    """A stage of the job. `tokens` counts all epochs; a prompt that several answers share counts once."""

    name: str
    """`sft` or `dpo`."""
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
    """Bytes on the device at the peak, by purpose.

    `rollouts` are there while the model writes answers, and `activations` and `temporary` while it learns.
    """

    model: int
    graders: int
    adapter: int
    optimizer: int
    activations: int
    temporary: int
    rollouts: int
    runtime: int
    total: int
    recompute_activations: bool


class Device(BaseModel):
    """The device with the most memory among the workers that serve the model."""

    kind: str
    name: str
    memory_bytes: int
    """The memory of one device."""
    count: int = 1
    """The number of such devices that the worker has."""


class Pace(BaseModel):
    """The speed of one device that the latest jobs of the project on this base model measured.

    Without any, it is that of the machines with one significant digit, and `jobs` is 0.
    """

    tokens_per_second: float
    overhead_seconds: float
    jobs: int


class Estimate(BaseModel):
    """The estimate of a job. If `refused` is not empty, a create would refuse the job, and the rest may be missing."""

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
                "devices": 1,
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
    """Whether a create would accept the job."""
    stages: list[StageEstimate] = []
    memory: MemoryEstimate | None = None
    device: Device | None = None
    devices: int = 1
    """The devices that the job takes at least. Without `resources.gpus`, they are the fewest that it fits on."""
    fits: bool | None = None
    pace: Pace | None = None
    seconds: float | None = None
    """Seconds from the first claim to the end, without the time in the queue."""
    queued_jobs: int = 0
    refused: list[Refusal] = []
    warnings: list[str] = []
