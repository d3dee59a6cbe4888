"""The devices that this worker trains on. They are found without torch, as the worker must not touch CUDA."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import structlog

from app.settings import DeviceSetting
from app.spec.json_types import JsonObject
from worker.machine import total_memory, usable_cpus

log = structlog.get_logger(__name__)

DRIVER_FILES = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia"))
"""Files that are there where a GPU's driver is loaded, or is passed into a container."""
QUERY_SECONDS = 20.0
"""A driver that does not answer within this time counts as broken."""


class DeviceUnusable(Exception):
    """The GPU of this machine cannot be used. The message says why."""


@dataclass(frozen=True)
class Device:
    """A device of a worker. `memory_bytes` is that of the GPU, or the device's share of the machine's.

    `visible` is the GPU's name in `CUDA_VISIBLE_DEVICES`. `threads` is the number of threads of a CPU device; None for
    one for each CPU. `machine` is the machine that has it in a Ray cluster; None for this machine. `is_planned`: that
    machine is still to start.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    memory_bytes: int
    visible: str | None = None
    threads: int | None = None
    machine: str | None = None
    is_planned: bool = False

    def as_json(self) -> JsonObject:
        """The device as workers register it."""
        return {"kind": self.kind, "name": self.name, "memory_bytes": self.memory_bytes}


def find_devices(wanted: DeviceSetting, cpu_devices: int = 0) -> list[Device]:
    """The visible GPUs, or the CPU devices of a machine that shows none, at least one.

    `wanted` is the setting `DPO_DEVICE`, `cpu_devices` is `DPO_CPU_DEVICES`. Raises `DeviceUnusable` if a GPU is
    wanted, or the machine shows one, and it does not answer. A worker that then trained on the CPU would be a hundred
    times slower without a word.
    """
    if wanted == "cpu" or (wanted == "auto" and not _shows_gpu()):
        if cpu_devices:
            share = total_memory() // cpu_devices
            return [Device("cpu", f"1 × {platform.machine()}", share, threads=1)] * cpu_devices
        return [Device("cpu", f"{usable_cpus()} × {platform.machine()}", total_memory())]
    return _gpus()


def on_machines(devices: Sequence[Device]) -> tuple[int, ...]:
    """The most of `devices` that are on one machine, on two, and so on up to all machines. (0,) without devices."""
    counts = sorted(Counter(device.machine for device in devices).values(), reverse=True)
    return tuple(accumulate(counts)) or (0,)


def without(devices: Sequence[Device], taken: Sequence[Device]) -> list[Device]:
    """`devices` less those that jobs have `taken`.

    A machine that was still to start is another one once it is there, and then any of its devices counts as taken.
    """
    free = list(devices)
    for device in taken:
        if device in free:
            free.remove(device)  # several CPU devices are equal
        elif device.is_planned and free:
            free.pop()
    return free


def choose(devices: Sequence[Device], count: int, machines: int) -> list[Device]:
    """`count` of `devices`, on as few machines as possible and at most `machines`, which have to be enough.

    Machines that it fills least are left for others: of those that have enough for the rest, the smallest is taken.
    """
    by_machine = defaultdict[str | None, list[Device]](list)
    for device in devices:
        by_machine[device.machine].append(device)
    groups, chosen = sorted(by_machine.values(), key=len), list[Device]()
    while len(chosen) < count and machines > 0:
        left, machines = count - len(chosen), machines - 1
        group = next((group for group in groups if len(group) >= left), groups[-1])
        groups.remove(group)
        chosen += group[:left]
    assert len(chosen) == count
    return chosen


def placement(devices: Sequence[Device]) -> JsonObject:
    """The fields of `run.json` that tell a trainer its devices."""
    first, visible = devices[0], [device.visible for device in devices]
    return {
        "device": first.kind,
        "ranks": len(devices),
        "visible": visible if all(visible) else None,
        "threads": first.threads,
    }


def _shows_gpu() -> bool:
    """Whether this machine has a GPU that torch could use, working or not."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    passed_in = os.environ.get("NVIDIA_VISIBLE_DEVICES", "") not in ("", "void", "none")
    shows = passed_in or shutil.which("nvidia-smi") is not None or any(path.exists() for path in DRIVER_FILES)
    build = importlib.metadata.version("torch")
    if shows and build.endswith("+cpu"):
        log.warning("the GPU is not used: this torch was built for CPUs only", torch=build)
        return False
    return shows


def _gpus() -> list[Device]:
    """The visible GPUs. Raises `DeviceUnusable`."""
    answer = _ask("uuid,name,memory.total")
    try:
        gpus = [_gpu(*line.split(",", 1)) for line in answer.stdout.splitlines()]
    except (ValueError, TypeError):  # it says what is wrong, on either stream, with any exit status
        gpus = []
    if not gpus:
        said = " ".join(f"{answer.stdout} {answer.stderr}".split())[:200]
        raise DeviceUnusable(f"'nvidia-smi' shows no GPU: {said or 'it says nothing'}")
    return gpus


def _gpu(uuid: str, rest: str) -> Device:
    """The GPU of a line of the driver's answer."""
    name, mebibytes = rest.rsplit(",", 1)
    return Device("cuda", name.strip(), int(mebibytes) * 1024**2, visible=uuid.strip())


@dataclass(frozen=True)
class GpuUse:
    """How busy a GPU is: the share of the last second in which it worked, and the bytes of its memory in use."""

    utilization: float
    memory_bytes: int


def use_of(devices: Sequence[Device]) -> GpuUse | None:
    """How busy the GPUs of a worker are together: the mean share, and the sum of the bytes.

    None for CPUs, for GPUs that do not tell, and for those of other machines.
    """
    if devices[0].kind == "cpu" or devices[0].machine is not None:
        return None
    try:
        lines = [line.split(",") for line in _ask("utilization.gpu,memory.used").stdout.splitlines()]
        share = sum(int(percent) for percent, _ in lines) / 100 / len(lines)
        return GpuUse(share, sum(int(mebibytes) for _, mebibytes in lines) * 1024**2)
    except (DeviceUnusable, ValueError, ZeroDivisionError):  # the next job finds out whether a GPU is broken
        return None


def _ask(fields: str) -> "subprocess.CompletedProcess[str]":
    """Ask the driver for fields of the visible GPUs. Raises `DeviceUnusable` if it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise DeviceUnusable("'nvidia-smi' is missing, so no GPU's driver is here")
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible}")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceUnusable(f"'nvidia-smi' does not answer: {error}") from error
