"""Trainers and readers, processes that start without the service's secrets. Those that they started end with them."""

import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from app.programs import command
from worker.machine import usable_cpus

START_SECONDS = 120.0
"""A fork server that does not answer within this time counts as hung."""
CHECK_SECONDS = 0.25
"""Interval at which a wait for the fork server asks whether the process is still wanted."""
UNKNOWN_STATUS = -signal.SIGKILL
"""The exit status to assume for a process whose fork server was killed."""
ALLOWED_VARIABLES = ("PATH", "HOME", "TMPDIR", "LANG", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
ALLOWED_PREFIXES = (
    "CUDA_",
    "NVIDIA_",
    "OMP_",
    "MKL_",
    "KMP_",
    "GOMP_",
    "TORCH",
    "PYTORCH_",
    "TRITON_",
    "NCCL_",
    "GLOO_",
    "LC_",
    "HF_HOME",
)


def trainer_environment(more: Sequence[str] = ()) -> dict[str, str]:
    """The environment variables that a trainer or a reader needs. The allow-list keeps the service's secrets out.

    `more` are prefixes of others that a program needs.

    Libraries take the host's cores for the number of their threads. Where fewer are usable, the environment says so.
    """
    variables = {
        name: value
        for name, value in os.environ.items()
        if name in ALLOWED_VARIABLES or name.startswith((*ALLOWED_PREFIXES, *more))
    }
    cpus = usable_cpus()
    return variables if cpus == os.cpu_count() else {"OMP_NUM_THREADS": str(cpus)} | variables


def answer_cache(stdin: IO[bytes], key: str) -> None:
    """Tell a trainer that waits for `key` to go on. The cache's file is now in its folder, or does not exist."""
    with suppress(BrokenPipeError):
        stdin.write(json.dumps({"key": key}).encode() + b"\n")
        stdin.flush()


def printed_result(status: int, printed: bytes, log: Path) -> Any:
    """The JSON of the last line that a program printed. Raises `RuntimeError` with the end of its log if it failed."""
    if status != 0:
        raise RuntimeError(log.read_text(errors="replace")[-2000:])
    return json.loads(printed.splitlines()[-1])


class Child:
    """A running process: a fork of the `ForkServer`, in a process group of its own."""

    def __init__(self, control: socket.socket, pid: int, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        """`stdin` stays open. The process ends when it closes, which also happens when this process dies."""
        self._control, self._wait_lock = control, threading.Lock()
        self._status: int | None = None

    def send_signal(self, number: int) -> None:
        """Send a signal to the process. It does nothing if the process has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for the exit status; −n means signal n. Several threads may wait."""
        with self._wait_lock:
            if self._status is None:
                try:
                    packet = self._control.recv(64)
                except OSError:
                    packet = b""
                self._status = int(packet) if packet else UNKNOWN_STATUS
            return self._status

    def kill(self) -> None:
        """Kill the process and the processes that it started. To be called in any case, since it frees the id."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        self._control.close()
        for pipe in (self.stdin, self.stdout):
            with suppress(OSError):
                pipe.close()


class CannotStart(Exception):
    """No process can be started on this machine. The log has what the fork server said, such as a failed import."""


class ForkServer:
    """A process that has loaded a program's libraries and forks its processes, so that no work waits for the imports.

    `log` is the file of a work folder that gets the standard error. `variables` are prefixes of environment variables
    that only this program needs. Several threads may start processes.
    """

    def __init__(
        self, program: str = "worker.trainer", log: str = "trainer.log", variables: Sequence[str] = ()
    ) -> None:
        self.program, self.log, self.variables = program, log, variables
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def prepare(self) -> None:
        """Start the process unless it runs."""
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self.close()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    command("worker.fork_server", self.program),
                    stdin=theirs.fileno(),  # the server ends when this socket closes
                    stdout=subprocess.DEVNULL,  # its errors go to the worker's log
                    start_new_session=True,
                    env=trainer_environment(self.variables),
                )
            self._socket = ours

    def start(
        self, folder: Path, check: Callable[[], None] = lambda: None, *, memory_bytes: int | None = None
    ) -> Child:
        """Start a process in `folder`. Raises `CannotStart` if the server hangs or ends, twice in a row.

        `check` is called while the server loads its libraries. If it raises, no process is started. `memory_bytes`
        limits the memory that the process may allocate.
        """
        for is_last_try in (False, True):
            self.prepare()
            try:
                return self._start(folder, check, memory_bytes)
            except OSError as error:  # the server was killed or hangs: start another
                self.close()
                if is_last_try:
                    raise CannotStart(f"no process of {self.program} can be started: {error}") from error
        raise AssertionError

    def _start(self, folder: Path, check: Callable[[], None], memory_bytes: int | None) -> Child:
        control, their_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        their_input, our_input = os.pipe()
        our_output, their_output = os.pipe()
        stdin, stdout = os.fdopen(our_input, "wb"), os.fdopen(our_output, "rb")
        request = {"folder": str(folder), "log": self.log, "memory_bytes": memory_bytes}
        try:
            with self._lock, their_control:
                if self._socket is None:
                    raise ConnectionResetError("the fork server was closed")
                descriptors = [their_input, their_output, their_control.fileno()]
                socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            deadline = time.monotonic() + START_SECONDS
            while not select.select([control], [], [], CHECK_SECONDS)[0]:
                check()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the fork server does not answer within {START_SECONDS:.0f} s")
            packet = control.recv(64)
            if not packet:
                raise ConnectionResetError("the fork server has ended")
        except BaseException:
            control.close()  # the server kills a process that it has started all the same
            stdin.close()
            stdout.close()
            raise
        finally:
            os.close(their_input)
            os.close(their_output)
        return Child(control, int(packet), stdin, stdout)

    def close(self) -> None:
        """End the server. A process that it has started does not end with it."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            if self._process is not None:
                kill_group(self._process)
            self._process = self._socket = None


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a process group, and the rest of the group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
