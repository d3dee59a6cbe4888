"""The machine that figures are kept with."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe_machine() -> dict[str, Any]:
    """Processor, cores and the versions of the libraries that matter."""
    found: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count()}
    return found | {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
