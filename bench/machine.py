"""A description of the machine, which is kept with every figure."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

from app.spec.json_types import JsonObject


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe_machine() -> JsonObject:
    """Processor, number of cores, and the versions of the libraries that the figures depend on."""
    machine = {"processor": processor(), "cores": os.cpu_count()}
    return machine | {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
