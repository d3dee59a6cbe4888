"""Whether the machine has room for a run: memory for the base model, and space on disk for checkpoints and the result.

A run that would fill its machine fails after hours. It is not begun, and another attempt may find more room.
"""

import shutil
from pathlib import Path

from app.spec.hyperparameters import MOMENT_BYTES
from worker.machine import free_memory
from worker.model_files import weight_bytes
from worker.trainer.model import Policy

LEAST_SHARE = {"none": 1.0, "fp8": 0.5, "int8": 0.5, "nf4": 0.25}
"""The least memory that a base takes, as a share of its files, by how it is held. Files have 16 bits or more."""
HELD_CHECKPOINTS = 2
"""Checkpoints that are on disk at once: one is uploaded while the next is written."""


class NoRoom(Exception):
    """The machine cannot hold the run. The message says how much there is, and how much the run takes."""


def require_memory(base: Path, quantization: str) -> None:
    """Raise `NoRoom` if the weights in the folder `base` cannot fit into this machine's free memory.

    For a run on the CPU. A GPU takes the weights tensor by tensor, and its host does not hold them.
    """
    needed = LEAST_SHARE[quantization] * weight_bytes(base)
    free = free_memory()
    if free < needed:
        raise NoRoom(f"the machine has {_size(free)} of memory free, and the model takes {_size(needed)}")


def require_disk(folder: Path, policy: Policy, optimizer: str) -> None:
    """Raise `NoRoom` if the disk of the work folder `folder` cannot hold the run's checkpoints and its result.

    `optimizer` is the name of the optimizer.
    """
    needed = disk_bytes(policy, optimizer)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoRoom(
            f"the disk of the work folder has {_size(free)} free, and the checkpoints and the result take "
            f"{_size(needed)}"
        )


def disk_bytes(policy: Policy, optimizer: str) -> int:
    """Bytes of the run's files: the checkpoints that are on disk at once, of weights and moments, and the result."""
    trained = list(policy.trainable().values())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    moments = MOMENT_BYTES[optimizer] * sum(parameter.numel() for parameter in trained)
    return HELD_CHECKPOINTS * (weights + moments) + weights


def _size(size: float) -> str:
    """A number of bytes as people read it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
