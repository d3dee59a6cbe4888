"""The device that this worker trains on. It is found without torch, because the worker process must not touch CUDA."""

import os
import platform
import shutil
import subprocess

from app.spec.json_types import JsonObject
from worker.machine import total_memory, usable_cpus


def device() -> JsonObject:
    """`kind` (cuda or cpu), `name` and `memory_bytes` of the first visible GPU, or of this machine without one."""
    return _gpu() or {"kind": "cpu", "name": f"{usable_cpus()} × {platform.machine()}", "memory_bytes": total_memory()}


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
