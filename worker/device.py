"""The device that this worker trains on. It is found without torch, because the worker process must not touch CUDA."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from app.settings import DeviceSetting
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
    """The device of a worker. `memory_bytes` is that of the GPU, or of the machine."""

    kind: Literal["cuda", "cpu"]
    name: str
    memory_bytes: int


def find_device(wanted: DeviceSetting) -> Device:
    """The first visible GPU, or the CPU of a machine that shows none. `wanted` is the setting `DPO_DEVICE`.

    Raises `DeviceUnusable` if a GPU is wanted, or the machine shows one, and it does not answer. A worker that then
    trained on the CPU would be a hundred times slower without a word.
    """
    if wanted == "cpu" or (wanted == "auto" and not _shows_gpu()):
        return Device("cpu", f"{usable_cpus()} × {platform.machine()}", total_memory())
    return _gpu()


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


def _gpu() -> Device:
    """The first visible GPU. Raises `DeviceUnusable`."""
    answer = _ask("name,memory.total")
    try:
        name, mebibytes = answer.stdout.splitlines()[0].rsplit(",", 1)
        return Device("cuda", name.strip(), int(mebibytes) * 1024**2)
    except (ValueError, IndexError) as error:  # it says what is wrong, on either stream, with any exit status
        said = " ".join(f"{answer.stdout} {answer.stderr}".split())[:200]
        raise DeviceUnusable(f"'nvidia-smi' shows no GPU: {said or 'it says nothing'}") from error


@dataclass(frozen=True)
class GpuUse:
    """How busy a GPU is: the share of the last second in which it worked, and the bytes of its memory in use."""

    utilization: float
    memory_bytes: int


def use_of(device: Device) -> GpuUse | None:
    """How busy a worker's device is. None for a CPU, and for a GPU that does not tell."""
    if device.kind == "cpu":
        return None
    try:
        percent, mebibytes = _ask("utilization.gpu,memory.used").stdout.splitlines()[0].split(",")
        return GpuUse(int(percent) / 100, int(mebibytes) * 1024**2)
    except (DeviceUnusable, ValueError, IndexError):  # the next job finds out whether the GPU is broken
        return None


def _ask(fields: str) -> "subprocess.CompletedProcess[str]":
    """Ask the driver for fields of the first visible GPU. Raises `DeviceUnusable` if it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise DeviceUnusable("'nvidia-smi' is missing, so no GPU's driver is here")
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible.split(',')[0]}")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceUnusable(f"'nvidia-smi' does not answer: {error}") from error
