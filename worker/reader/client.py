"""Give tasks to the reader. The worker's process never parses what users have uploaded."""

import json
import signal
import time
from pathlib import Path
from typing import Any

from app.spec.json_types import JsonObject
from worker.machine import total_memory
from worker.processes import Child, ForkServer
from worker.reader import NO_MEMORY
from worker.waiting import Check, in_thread

MEMORY_SHARE, LEAST_MEMORY, MOST_MEMORY = 8, 512 * 1024**2, 4 * 1024**3
"""A task may allocate this fraction of the machine's memory: at least and at most so many bytes.

The libraries take a quarter of the least.
"""
LEAST_SECONDS, BYTES_PER_SECOND = 120.0, 1_000_000
"""The time of a task: a start, and as long as it takes to read the file at this pace. Most files take far less."""


class TooCostly(Exception):
    """A file takes more memory or time to read than a file of its size should. The message says what to do."""


class Reader:
    """Does tasks in processes of their own. Several threads may give tasks."""

    def __init__(self) -> None:
        self._server = ForkServer("worker.reader", "reader.log")
        self.memory_bytes = min(MOST_MEMORY, max(LEAST_MEMORY, total_memory() // MEMORY_SHARE))

    def prepare(self) -> None:
        """Load the libraries now, so that the first task does not wait for it."""
        self._server.prepare()

    def close(self) -> None:
        """End the process that holds the libraries."""
        self._server.close()

    def do(self, folder: Path, task: JsonObject, size: int, check: Check) -> Any:
        """The result of a task over files of `size` bytes in all. `folder` gets the task and its log.

        Raises `TooCostly`, what `check` raises, `CannotStart`, or `RuntimeError` with the end of the log.
        """
        (folder / "task.json").write_text(json.dumps(task))
        seconds = LEAST_SECONDS + size / BYTES_PER_SECOND
        deadline = time.monotonic() + seconds

        def check_deadline() -> None:
            check()
            if time.monotonic() > deadline:
                raise TooCostly(
                    f"It takes longer to read than {seconds:.0f} s, the time for a file of its size. {ADVICE}"
                )

        child = self._server.start(folder, check_deadline, memory_bytes=self.memory_bytes)
        try:
            status, printed = _outcome(child, check_deadline)
        finally:
            child.kill()
        if status in (NO_MEMORY, -signal.SIGABRT):  # a library that gets no memory aborts
            gigabytes = self.memory_bytes / 1024**3
            raise TooCostly(f"It takes more than {gigabytes:.1f} GiB of memory to read. {ADVICE}")
        if status != 0:
            raise RuntimeError((folder / "reader.log").read_text(errors="replace")[-2000:])
        return json.loads(printed.splitlines()[-1])


ADVICE = "Divide it into smaller files, or shorten its rows."


def _outcome(child: Child, check: Check) -> tuple[int, bytes]:
    """(exit status, what it printed)."""
    printed = in_thread(child.stdout.read, check)
    return in_thread(child.wait, check), printed
