"""Trainer processes: started without the service's secrets, one ahead of its job, and ended with all they began."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
PREFIXES = (
    "CUDA_",
    "NVIDIA_",
    "OMP_",
    "MKL_",
    "KMP_",
    "GOMP_",
    "TORCH",
    "PYTORCH_",
    "TRITON_",
    "LC_",
    "HF_HOME",
)


def trainer_environment() -> dict[str, str]:
    """What a trainer needs of the environment, and none of its secrets: an allow-list."""
    return {k: v for k, v in os.environ.items() if k in VARIABLES or k.startswith(PREFIXES)}


def spawn_trainer() -> "subprocess.Popen[bytes]":
    """Start a trainer, in a process group of its own, that waits for its folder as a line on its standard input."""
    return subprocess.Popen(
        [sys.executable, "-m", "worker.trainer"],
        stdin=subprocess.PIPE,  # held open: the trainer ends by itself when this process is gone
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # until it has a folder with a log
        start_new_session=True,
        env=trainer_environment(),
    )


def give_folder(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Let a trainer that waits begin. Raises `BrokenPipeError` for one that has died."""
    assert process.stdin is not None
    process.stdin.write(f"{folder}\n".encode())
    process.stdin.flush()


def answer_cache(process: "subprocess.Popen[bytes]", key: str) -> None:
    """Tell a trainer that waits for `key` that the cache was asked: the file is in its folder, or nobody has it."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps({"key": key}).encode() + b"\n")
        process.stdin.flush()


class Spare:
    """A trainer that has torch loaded and waits, so that a job's first step need not."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Have one ready."""
        if self._process is None or self._process.poll() is not None:
            self._process = spawn_trainer()

    def take(self, folder: Path) -> "subprocess.Popen[bytes]":
        """The trainer of `folder`; the next one is prepared when this one no longer needs the machine."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            with suppress(BrokenPipeError):
                give_folder(process, folder)
                return process
        process = spawn_trainer()
        give_folder(process, folder)
        return process

    def close(self) -> None:
        if self._process is not None:
            kill_group(self._process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the trainer and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
