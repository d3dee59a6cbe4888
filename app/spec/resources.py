"""The devices of a job, and how its work is divided among them."""

from typing import Annotated, Self

from pydantic import Discriminator, Field, Tag, model_validator

from app.spec.schema_base import Automatic, inconsistent

MOST_DEVICES = 1024
VIRTUAL_RANKS = 16
SHARDED_FROM = 0.5
"""Several devices divide a model that would take more than this share of one's memory, unless the job decides."""
Count = Annotated[int, Field(ge=1, le=MOST_DEVICES)]


class DeviceRange(Automatic):
    """A number of devices that may differ from attempt to attempt."""

    min: Count = 1
    """The fewest devices that an attempt starts with."""
    max: Count
    """The most devices that an attempt takes, if they are free when it starts."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise inconsistent("min", f"'min' ({self.min}) is larger than 'max' ({self.max})")
        return self


class Resources(Automatic):
    """The devices that a job trains on. An adapter has the same bytes whatever their number."""

    gpus: (
        Annotated[
            Annotated[Count, Tag("number[]")] | Annotated[DeviceRange, Tag("range[]")],
            Discriminator(lambda value: "range[]" if isinstance(value, dict | DeviceRange) else "number[]"),
        ]
        | None
    ) = None
    """The number of devices of one worker: GPUs, or the CPU devices of a machine without GPUs. Null: the fewest on
    which the job fits."""
    nodes: Count = 1
    """The most machines that these devices may be on. A worker of a Ray cluster has devices on several."""

    @property
    def least(self) -> int:
        """The fewest devices that an attempt starts with."""
        return self.gpus.min if isinstance(self.gpus, DeviceRange) else self.gpus or 1

    @property
    def most(self) -> int:
        """The most devices that an attempt takes."""
        return self.gpus.max if isinstance(self.gpus, DeviceRange) else self.gpus or 1


class Parallel(Automatic):
    """How the work of a step, and the model, are divided."""

    shard: bool | None = None
    """Whether each device keeps only a part of the model, and gathers one layer at a time. An adapter has the same
    bytes either way. Null: only if the model would take more than half of a device's free memory."""
    virtual_ranks: Annotated[int, Field(ge=1, le=MOST_DEVICES)] = VIRTUAL_RANKS
    """The gradient of a step is the sum of so many parts, each computed on one device. More devices than parts do not
    help. Another number changes the last bits of the gradient."""
