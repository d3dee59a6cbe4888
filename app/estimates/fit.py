"""Check whether a job fits into the memory of the device that would train it, and advise what would make it fit."""

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy.orm import Session

from app.broker import Lane
from app.errors import ServiceError
from app.estimates.memory import MemorySettings, Shape, estimate
from app.estimates.schemas import Device
from app.models import repository as models
from app.models.tables import Model
from app.spec.job import JobSpec, StageSpec
from app.spec.resources import Resources
from app.workers import repository as workers
from app.workers.tables import Worker

CODE = "does_not_fit"
TOLERANCE = 1.15
"""Allowed error of the estimate: a job is refused only if it needs more than this multiple of the memory."""
SHORTEST_ROW = 16
"""The assumed row length in tokens if the rows have not been counted: the minimum of `max_length`."""


def shape_of(session: Session, project: str, spec: JobSpec, base_model: str) -> Shape | None:
    """The shape of a job's base model, with its reward models; None if no worker has registered the base."""
    shape = _shape(session, base_model)
    if shape is None:
        return None
    graders = [models.find(session, project, name) for _, name in spec.grader_models]
    shapes = [_shape(session, grader.base_model) for grader in graders if grader is not None]
    return replace(shape, graders=sum(grader.parameters for grader in shapes if grader is not None))


def _shape(session: Session, base_model: str) -> Shape | None:
    base = session.get(Model, base_model)
    return None if base is None else Shape.of(base.details)


def devices_of(session: Session, base_model: str, nodes: int = 1) -> list[Device]:
    """The devices of the workers that serve a base model, one entry for each worker: those on `nodes` machines."""
    return [
        Device(**worker.details["device"], count=workers.devices_of(worker, nodes) or 1)
        for worker in _serving(session, base_model)
        if worker.details.get("device")
    ]


def _serving(session: Session, *base_models: str) -> list[Worker]:
    """The present GPU workers that serve all these base models."""
    return [worker for worker in workers.present(session, Lane.GPU) if workers.serves(worker, *base_models)]


def wide_enough(devices: Sequence[Device], spec: JobSpec) -> list[Device]:
    """Those of `devices` whose worker has as many as a job takes at least."""
    return [device for device in devices if device.count >= spec.resources.least]


def require_devices(session: Session, resources: Resources, *base_models: str) -> None:
    """Refuse a job that wants more devices than any worker of its base models has.

    Without a worker, it waits for one.
    """
    serving = _serving(session, *base_models)
    known = [worker for worker in serving if workers.devices_of(worker) is not None]
    most = max((workers.devices_of(worker, resources.nodes) or 0 for worker in known), default=None)
    if most is not None and len(known) == len(serving) and resources.least > most:
        where = "" if resources.nodes == 1 else f" on {resources.nodes} machines"
        message = f"The job wants {resources.least} devices, and the largest worker has {most}{where}."
        enough = (nodes for worker in known if (nodes := workers.machines_for(worker, resources.least)) is not None)
        nodes = min(enough, default=None)
        remedy = "Lower 'resources.gpus'."
        if nodes is not None:
            remedy = f"{nodes} machines have so many: raise 'resources.nodes'."
        raise ServiceError(f"{message} {remedy}", param="resources.gpus", code=CODE)


def largest(devices: Sequence[Device]) -> Device | None:
    """The device with the most memory, of a worker with as many as possible; None if there is none."""
    return max(devices, key=lambda device: (device.memory_bytes, device.count), default=None)


def placed(spec: JobSpec, shape: Shape, devices: Sequence[Device], longest_row: int | None) -> JobSpec:
    """The resolved `spec` with a number of devices: if it names none, the fewest of a worker that it fits on, or one.

    `longest_row` is that of `refusal`.
    """
    if spec.resources.gpus is not None or spec.parallel.shard is False:
        return spec
    most = max((device.count for device in devices), default=1)
    candidates = [spec, *(_on(spec, count) for count in range(2, most + 1))]
    for several in (1.0, TOLERANCE):  # rather on more devices than only perhaps on fewer, unless it may be one
        for candidate in candidates:
            tolerance = several if candidate.resources.least > 1 else TOLERANCE
            if any(_fits(candidate, shape, each, longest_row, tolerance) for each in wide_enough(devices, candidate)):
                return candidate
    return spec


def _on(spec: JobSpec, count: int) -> JobSpec:
    """`spec` with so many devices."""
    return spec.model_copy(update={"resources": spec.resources.model_copy(update={"gpus": count})})


def least_memory(spec: JobSpec, shape: Shape, devices: Sequence[Device], longest_rows: dict[str, int]) -> int:
    """Bytes of memory of a device without which the resolved job cannot run on any kind of `devices`.

    `longest_rows` has the tokens of the longest row by stage. The packing adapts to a device, so this counts one row.
    """
    device = largest(devices)
    kind = "cuda" if device is None else device.kind
    smallest = (_smallest(spec, stage, max(SHORTEST_ROW, longest_rows[stage.name])) for stage in spec.stages())
    return int(max(estimate(shape, settings, kind, None).total for settings in smallest) / TOLERANCE)


def refusal(spec: JobSpec, shape: Shape, devices: Sequence[Device], longest_row: int | None) -> tuple[str, str] | None:
    """(param, message) if the resolved job cannot fit on any of `devices`; None if it can, or if there are too few.

    `longest_row` is in tokens, or None if the rows have not been counted. Then the shortest possible rows are assumed,
    so a job is refused only if it could not fit with any rows.
    """
    wide = wide_enough(devices, spec)
    device = largest(wide)
    if device is None or any(_fits(spec, shape, each, longest_row) for each in wide):
        return None
    settings = max(
        (_smallest(spec, stage, longest_row or SHORTEST_ROW) for stage in reversed(spec.stages())),
        key=lambda settings: _needed_bytes(shape, settings, device),
    )
    param, hint = _remedy(shape, settings, device)
    needed = f"{_needed_bytes(shape, settings, device) / 1e9:.1f} GB"
    each = f" on each of {settings.devices} devices" if settings.devices > 1 else ""
    available = f"the largest worker ({device.name}) has {device.memory_bytes / 1e9:.1f} GB"
    return param, f"The job needs about {needed}{each}, and {available}. {hint}"


def _fits(spec: JobSpec, shape: Shape, device: Device, longest_row: int | None, tolerance: float = TOLERANCE) -> bool:
    """Whether no stage of the resolved job needs more than `tolerance` times the memory of a device of this kind."""
    smallest = (_smallest(spec, stage, longest_row or SHORTEST_ROW) for stage in spec.stages())
    return all(_needed_bytes(shape, settings, device) <= tolerance * device.memory_bytes for settings in smallest)


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
        advice = f"A 'max_length' that keeps rows under {length} tokens would fit."
        if settings.answers:
            advice = f"A 'max_tokens' that keeps a prompt and its answers under {length} tokens would fit."
        changes.append(("method", advice, replace(settings, longest_row=length)))
    if settings.rank is not None and settings.quantization != "nf4":
        advice = "'quantization': 'nf4' would fit."
        if settings.quantization == "fp8":
            advice = "'quantization': 'nf4' would fit, without 'compute_dtype'."
        changes.insert(0, ("quantization", advice, replace(settings, quantization="nf4")))
    if settings.rank is None:
        lora = replace(settings, rank=16, quantization="nf4")
        changes.append(("adapter", "A LoRA adapter on an 'nf4' base would fit: leave 'adapter' out.", lora))
    more = range(settings.devices + 1, device.count + 1 if settings.shard is not False else 0)
    changes[:0] = [
        (
            "resources.gpus",
            f"Divided among {count} devices it would fit: 'resources': {{'gpus': {count}}}.",
            replace(settings, devices=count),
        )
        for count in more
    ]
    for param, hint, changed in changes:
        if _needed_bytes(shape, changed, device) <= device.memory_bytes:
            return param, hint
    return "model", "No setting would make it fit. It needs a larger device."
