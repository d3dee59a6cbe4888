"""Whether a job can fit into the memory of what would train it, and what would make it fit."""

from dataclasses import replace

from sqlalchemy.orm import Session

from app.broker import Lane
from app.estimates.memory import MemorySettings, Shape, estimate
from app.estimates.schemas import Device
from app.models import repository as models
from app.models.tables import Model
from app.spec.job import JobSpec
from app.workers import repository as workers

CODE = "does_not_fit"
TOLERANCE = 1.15
"""How far the estimate may be off: a job is refused only where it would not fit by even more than that."""
SHORTEST = 16
"""The least that `max_length` can be, where nothing is known of the rows."""


def shape_of(session: Session, model: models.ResolvedModel) -> Shape | None:
    base = session.get(Model, model.base_model)
    return None if base is None else Shape.of(base.details)


def device_of(session: Session, model: models.ResolvedModel) -> Device | None:
    """Of the workers that serve the model, the device with the most memory."""
    present = [w for w in workers.present(session, Lane.GPU) if workers.serves(w, model.base_model)]
    devices = [Device(**worker.details["device"]) for worker in present if worker.details.get("device")]
    return max(devices, key=lambda device: device.memory_bytes, default=None)


def refusal(spec: JobSpec, shape: Shape, device: Device, longest_row: int | None) -> tuple[str, str] | None:
    """(param, message) where the resolved job cannot fit; None where it can.

    `longest_row` is None where the rows have not been counted: then only what no row can mend is refused.
    """
    for stage in reversed(spec.stages()):
        # A batch is packed as far as memory allows; what cannot be cut is the longest row.
        settings = MemorySettings.of(spec, stage.settings, 0.0, longest_row or SHORTEST)
        settings = replace(settings, recompute=True if settings.recompute is None else settings.recompute)
        needed = _needed(shape, settings, device)
        if needed > TOLERANCE * device.memory_bytes:
            param, hint = _remedy(shape, settings, device)
            gigabytes = (
                f"{needed / 1e9:.1f} GB, and the largest worker ({device.name}) has {device.memory_bytes / 1e9:.1f}"
            )
            return param, f"The job needs about {gigabytes} GB. {hint}"
    return None


def _needed(shape: Shape, settings: MemorySettings, device: Device) -> int:
    return estimate(shape, settings, device.kind, device.memory_bytes).total


def _remedy(shape: Shape, settings: MemorySettings, device: Device) -> tuple[str, str]:
    """(the field to change, what to do), the gentlest first that would make the job fit."""
    settings = replace(settings, recompute=True)
    tried: list[tuple[str, str, MemorySettings]] = []
    length = settings.longest_row
    while length > 256:
        length //= 2
        shorter = replace(settings, longest_row=length)
        tried.append(("method", f"A 'max_length' that keeps rows under {length} tokens would fit.", shorter))
    if settings.rank is not None and settings.quantization != "nf4":
        tried.insert(0, ("quantization", "'quantization': 'nf4' would fit.", replace(settings, quantization="nf4")))
    if settings.rank is None:
        lora = replace(settings, rank=16, quantization="nf4")
        tried.append(("adapter", "A LoRA adapter (leave 'adapter' out) on a base in 'nf4' would fit.", lora))
    for param, hint, changed in tried:
        if _needed(shape, changed, device) <= device.memory_bytes:
            return param, hint
    return "model", "No setting would make it fit: it needs a larger device."
