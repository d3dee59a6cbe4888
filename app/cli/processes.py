"""`dpo serve` and `dpo worker`: one foreground process starts the parts as children and ends them together."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType

WORKER_SECONDS = 30.0
"""Time for a worker to end. It takes up to 20 seconds."""
PARENT_PIPE = "DPO_PARENT_PIPE"


def end_with_parent() -> None:
    """In a process that `supervise` started: drain once the supervisor is gone."""
    number = os.environ.pop(PARENT_PIPE, None)
    if number is not None:
        threading.Thread(target=_wait_for_end, args=(int(number),), daemon=True).start()


def _wait_for_end(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def supervise(commands: dict[str, list[str]], seconds: float = WORKER_SECONDS) -> int:
    """Run `commands` (name → program and arguments) until one ends, or until SIGINT or SIGTERM comes.

    Then send SIGTERM to all, which drains them. One that has not ended after `seconds` is killed. Returns 0 after a
    signal, else 1.
    """
    stop = threading.Event()
    signalled = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        signalled.set()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    # The children hold the reading end of a pipe that nobody writes to. It ends when this process is gone, even by
    # kill -9. Each child has its own process group, so that Ctrl-C reaches only this process, which then drains them.
    reading, _writing = os.pipe()
    environment = os.environ | {PARENT_PIPE: str(reading)}
    children = {
        name: subprocess.Popen(arguments, process_group=0, pass_fds=[reading], env=environment)
        for name, arguments in commands.items()
    }
    os.close(reading)
    for name, child in children.items():
        threading.Thread(target=_watch, args=(name, child, stop), daemon=True).start()
    stop.wait()
    deadline = time.monotonic() + seconds
    for child in children.values():
        if child.poll() is None:
            child.terminate()
    for child in children.values():
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return 0 if signalled.is_set() else 1


def _watch(name: str, child: "subprocess.Popen[bytes]", stop: threading.Event) -> None:
    status = child.wait()
    if not stop.is_set():
        print(f"dpo: the {name} process ended with status {status}; stopping the others.", file=sys.stderr)
        stop.set()
