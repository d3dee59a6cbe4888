"""`dpo serve` and `dpo worker`: the parts as child processes of one foreground process, ended together."""

import os
import signal
import subprocess
import sys
import threading
from types import FrameType

GRACE_SECONDS = 60


def supervise(commands: dict[str, list[str]]) -> int:
    """Run `commands` (name → arguments after the interpreter) until one ends or SIGINT or SIGTERM comes.

    Then all get SIGTERM, which drains them, and are waited for. Returns 0 where a signal asked for it, else 1.
    """
    stop = threading.Event()
    asked = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        asked.set()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    children = {
        # In a process group of its own, so that Ctrl-C reaches this process only, which then drains them in order.
        name: subprocess.Popen([sys.executable, *arguments], process_group=0)
        for name, arguments in commands.items()
    }
    for name, child in children.items():
        threading.Thread(target=_watch, args=(name, child, stop), daemon=True).start()
    stop.wait()
    for child in children.values():
        if child.poll() is None:
            child.terminate()
    for child in children.values():
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return 0 if asked.is_set() else 1


def _watch(name: str, child: "subprocess.Popen[bytes]", stop: threading.Event) -> None:
    status = child.wait()
    if not stop.is_set():
        print(f"dpo: the {name} process ended with status {status}; stopping the others.", file=sys.stderr)
        stop.set()
