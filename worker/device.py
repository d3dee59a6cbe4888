"""The device that this worker trains on. It is found without torch, because the worker process must not touch CUDA."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from app.spec.json_types import JsonObject

MEMINFO, CGROUP_LIMIT = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")


def device() -> JsonObject:
    """`kind` (cuda or cpu), `name` and `memory_bytes` of the first visible GPU, or of this machine without one."""
    return _gpu() or {"kind": "cpu", "name": f"{os.cpu_count()} × {platform.machine()}", "memory_bytes": host_memory()}


def _gpu() -> JsonObject | None:
    program = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if program is None or visible in ("", "-1"):
        return None
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    if visible:
        command.append(f"--id={visible.split(',')[0]}")
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        name, mebibytes = lines[0].rsplit(",", 1)
        return {"kind": "cuda", "name": name.strip(), "memory_bytes": int(mebibytes) * 1024**2}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def host_memory() -> int:
    """The memory of this machine in bytes, or the limit of its container if that is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if CGROUP_LIMIT.exists() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return total
