"""Wait for slow work and stay able to stop: each wait asks four times a second whether the work is still wanted.

A `Check` is a function that raises if it is not, such as `Lease.check`. The wait then ends with its error.
"""

import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import IO, TypeVar

from worker.processes import kill_group

Check = Callable[[], None]
Result = TypeVar("Result")
POLL_SECONDS = 0.25
THREAD_NAME = "waited for"


def always_wanted() -> None:
    """The check of work that nobody can stop."""


def in_thread(work: Callable[[], Result], check: Check) -> Result:
    """Do `work` in a thread and wait for its result.

    If `check` raises, the thread is left alone. It may hang in a network call. Nobody reads its result, its files are
    in a folder that is removed, and all that it writes to the database is guarded by the attempt.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=THREAD_NAME, daemon=True).start()
    while not wait([future], POLL_SECONDS).done:
        check()
    return future.result()


def within(seconds: float, check: Check, error: Exception) -> Check:
    """A check that raises what `check` raises, and `error` once `seconds` have passed from now."""
    deadline = time.monotonic() + seconds

    def check_both() -> None:
        check()
        if time.monotonic() > deadline:
            raise error

    return check_both


def briefly(work: Callable[[], object], seconds: float) -> None:
    """Do `work` in a thread, and wait for at most `seconds`. Its errors count for nothing, as does its result."""
    with suppress(Exception):
        in_thread(work, within(seconds, always_wanted, TimeoutError()))


def run_process(
    command: Sequence[str], check: Check, *, env: dict[str, str], stderr: IO[bytes] | int | None = None
) -> tuple[int, bytes]:
    """Run a program to its end. Returns its exit status and what it printed. If `check` raises, it is killed.

    Its standard input stays open as long as this process lives.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True, env=env
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        printed = in_thread(process.stdout.read, check)
        status = in_thread(process.wait, check)
    except BaseException:
        kill_group(process)
        raise
    process.stdin.close()
    process.stdout.close()
    return status, printed
