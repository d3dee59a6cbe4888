"""Check whether a job fits into the memory of the device that would train it, and advise what would make it fit."""

from dataclasses import replace

from sqlalchemy.orm import Session

from app.broker import Lane
from app.estimates.memory import MemorySettings, Shape, estimate
from app.estimates.schemas import Device
from app.models.tables import Model
from app.spec.job import JobSpec, StageSpec
from app.workers import repository as workers

CODE = "does_not_fit"
TOLERANCE = 1.15
"""Allowed error of the estimate: a job is refused only if it needs more than this multiple of the memory."""
SHORTEST_ROW = 16
"""The assumed row length in tokens if the rows have not been counted: the minimum of `max_length`."""


def shape_of(session: Session, base_model: str) -> Shape | None:
    """The shape of a base model; None if no worker has registered it."""
    base = session.get(Model, base_model)
    return None if base is None else Shape.of(base.details)


def device_of(session: Session, base_model: str) -> Device | None:
    """The device with the most memory among the workers that serve a base model; None if there is none."""
    serving = [worker for worker in workers.present(session, Lane.GPU) if workers.serves(worker, base_model)]
    devices = [Device(**worker.details["device"]) for worker in serving if worker.details.get("device")]
    return max(devices, key=lambda device: device.memory_bytes, default=None)


def least_memory(session: Session, spec: JobSpec, base_model: str, longest_rows: dict[str, int]) -> int | None:
    """Bytes of memory without which the resolved job cannot run; None if the sizes of its base are not known.

    `longest_rows` has the tokens of the longest row by stage. The packing adapts to a device, so this counts one row.
    """
    shape, device = shape_of(session, base_model), device_of(session, base_model)
    if shape is None:
        return None
    kind = "cuda" if device is None else device.kind
    smallest = (_smallest(spec, stage, max(SHORTEST_ROW, longest_rows[stage.name])) for stage in spec.stages())
    return int(max(estimate(shape, settings, kind, None).total for settings in smallest) / TOLERANCE)


def refusal(spec: JobSpec, shape: Shape, device: Device, longest_row: int | None) -> tuple[str, str] | None:
    """(param, message) if the resolved job cannot fit on `device`; None if it can.

    `longest_row` is in tokens, or None if the rows have not been counted. Then the shortest possible rows are assumed,
    so a job is refused only if it could not fit with any rows.
    """
    for stage in reversed(spec.stages()):
        settings = _smallest(spec, stage, longest_row or SHORTEST_ROW)
        needed = _needed_bytes(shape, settings, device)
        if needed > TOLERANCE * device.memory_bytes:
            param, hint = _remedy(shape, settings, device)
            available = f"the largest worker ({device.name}) has {device.memory_bytes / 1e9:.1f} GB"
            return param, f"The job needs about {needed / 1e9:.1f} GB, and {available}. {hint}"
    return None


def _smallest(spec: JobSpec, stage: StageSpec, longest_row: int) -> MemorySettings:
    """The settings with which a stage of the resolved job takes the least memory.

    The packing adapts to the memory, but a pack holds at least the longest row.
    """
    settings = MemorySettings.of(spec, stage.settings, 0.0, longest_row)
    return replace(settings, recompute=True if settings.recompute is None else settings.recompute)


def _needed_bytes(shape: Shape, settings: MemorySettings, device: Device) -> int:
    """Bytes of memory at the peak."""
    return estimate(shape, settings, device.kind, device.memory_bytes).total


def _remedy(shape: Shape, settings: MemorySettings, device: Device) -> tuple[str, str]:
    """(the field to change, the advice) of the mildest change that would make the job fit."""
    settings = replace(settings, recompute=True)
    changes: list[tuple[str, str, MemorySettings]] = []
    """(field, advice, the settings with the change), mildest first."""
    length = settings.longest_row
    while length > 256:
        length //= 2
        shorter = replace(settings, longest_row=length)
        changes.append(("method", f"A 'max_length' that keeps rows under {length} tokens would fit.", shorter))
    if settings.rank is not None and settings.quantization != "nf4":
        changes.insert(0, ("quantization", "'quantization': 'nf4' would fit.", replace(settings, quantization="nf4")))
    if settings.rank is None:
        lora = replace(settings, rank=16, quantization="nf4")
        changes.append(("adapter", "A LoRA adapter on an 'nf4' base would fit: leave 'adapter' out.", lora))
    for param, hint, changed in changes:
        if _needed_bytes(shape, changed, device) <= device.memory_bytes:
            return param, hint
    return "model", "No setting would make it fit. It needs a larger device."
