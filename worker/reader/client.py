"""Give tasks to the reader. The worker's process never parses what users have uploaded."""

import json
import signal
from pathlib import Path
from typing import Any

from app.spec.json_types import JsonObject
from worker.machine import total_memory
from worker.processes import ForkServer, printed_result
from worker.reader import NO_MEMORY
from worker.waiting import Check, in_thread, within

MEMORY_SHARE, LEAST_MEMORY, MOST_MEMORY = 8, 512 * 1024**2, 4 * 1024**3
"""A task may allocate this fraction of the machine's memory: at least and at most so many bytes.

The libraries take a quarter of the least.
"""
LEAST_SECONDS, BYTES_PER_SECOND = 120.0, 1_000_000
"""The time of a task: a start, and as long as it takes to read the file at this pace. Most files take far less."""
ADVICE = "Divide it into smaller files, or shorten its rows."
LOG = "reader.log"


class TooCostly(Exception):
    """A file takes more memory or time to read than a file of its size should. The message says what to do."""


class Reader:
    """Does tasks in processes of their own. Several threads may give tasks."""

    def __init__(self) -> None:
        self._server = ForkServer("worker.reader", LOG)
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
        slow = TooCostly(f"It takes longer to read than {seconds:.0f} s, the time for a file of its size. {ADVICE}")
        check = within(seconds, check, slow)
        child = self._server.start(folder, check, memory_bytes=self.memory_bytes)
        try:
            printed = in_thread(child.stdout.read, check)
            status = in_thread(child.wait, check)
        finally:
            child.kill()
        if status in (NO_MEMORY, -signal.SIGABRT):  # a library that gets no memory aborts
            gigabytes = self.memory_bytes / 1024**3
            raise TooCostly(f"It takes more than {gigabytes:.1f} GiB of memory to read. {ADVICE}")
        return printed_result(status, printed, folder / LOG)
