"""Trainer processes: started without the service's secrets, with torch loaded, and ended with all they began."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

START_SECONDS = 120.0
"""A fork server that has not answered by then hangs."""
UNKNOWN_STATUS = -signal.SIGKILL
"""The exit status of a trainer whose fork server was killed."""
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


def answer_cache(stdin: IO[bytes], key: str) -> None:
    """Tell a trainer that waits for `key` that the cache was asked: the file is in its folder, or nobody has it."""
    with suppress(BrokenPipeError):
        stdin.write(json.dumps({"key": key}).encode() + b"\n")
        stdin.flush()


class Trainer:
    """A trainer at work: a fork of the `ForkServer`, in a process group of its own."""

    def __init__(self, server: socket.socket, pid: int, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        """`stdin` is held open: the trainer ends by itself when this process is gone."""
        self._server, self._waiting = server, threading.Lock()
        self._status: int | None = None

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for the exit status, negative for a signal. Safe in several threads."""
        with self._waiting:
            if self._status is None:
                try:
                    packet = self._server.recv(64)
                except OSError:
                    packet = b""
                self._status = int(packet) if packet else UNKNOWN_STATUS
            return self._status

    def kill(self) -> None:
        """End the trainer and whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        for pipe in (self.stdin, self.stdout):
            with suppress(OSError):
                pipe.close()


class ForkServer:
    """A process that has torch loaded, and forks a trainer for one job at a time: its first step need not wait."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def prepare(self) -> None:
        """Have the process there."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.trainer.fork_server"],
                stdin=theirs.fileno(),  # the server ends when this process is gone
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=trainer_environment(),
            )
        self._socket = ours

    def start(self, folder: Path) -> Trainer:
        """Start the trainer of `folder`. Raises `OSError` where that takes too long or the server ends."""
        for last in (False, True):
            self.prepare()
            try:
                return self._start(folder)
            except OSError:  # it was killed, by whomever
                self.close()
                if last:
                    raise
        raise AssertionError

    def _start(self, folder: Path) -> Trainer:
        assert self._socket is not None
        their_input, our_input = os.pipe()
        our_output, their_output = os.pipe()
        stdin, stdout = os.fdopen(our_input, "wb"), os.fdopen(our_output, "rb")
        try:
            self._socket.settimeout(START_SECONDS)
            socket.send_fds(self._socket, [str(folder).encode()], [their_input, their_output])
            packet = self._socket.recv(64)
            if not packet:
                raise ConnectionResetError("the fork server has ended")
        except OSError:
            stdin.close()
            stdout.close()
            raise
        finally:
            os.close(their_input)
            os.close(their_output)
        self._socket.settimeout(None)  # a training may take its time
        return Trainer(self._socket, int(packet), stdin, stdout)

    def close(self) -> None:
        """End the process. A trainer ends by itself."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            kill_group(self._process)
        self._process = self._socket = None


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
