"""`python -m worker.trainer.fork_server`: load torch once, then fork a trainer for each job.

Its standard input is a Unix socket of sequenced packets. A request is the path of a work folder, with the trainer's
standard input and output as file descriptors. There are two answers: the trainer's process id, and its exit status
once it has ended. The process id stays taken until the next request comes, so that a late signal hits nobody else.

Nothing here may touch a GPU: a process cannot hand its CUDA driver to its forks. Where a library has loaded the driver
all the same, the fork starts a fresh interpreter.
"""

import gc
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from worker.trainer.__main__ import ENVIRONMENT, run

DRIVER = "libcuda.so"


def main() -> None:
    os.environ.update(ENVIRONMENT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = socket.socket(fileno=os.dup(0))
    # Imported before the first request: this is what a job need not wait for.
    import worker.trainer.evaluation
    import worker.trainer.loop  # noqa: F401

    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page that it walks
    trainer: int | None = None
    while True:
        packet, descriptors, _, _ = socket.recv_fds(requests, 1 << 16, 2)
        if trainer is not None:
            os.waitpid(trainer, 0)
        if not packet:
            return
        trainer = os.fork()
        if trainer == 0:
            requests.close()
            _become_trainer(packet.decode(), *descriptors)
        os.setpgid(trainer, trainer)  # the fork says so too: whoever is first, the group is there before the answer
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(str(trainer).encode())
        requests.send(str(_status_of(trainer)).encode())


def _status_of(trainer: int) -> int:
    """Wait for the exit status of a trainer, negative for a signal. Its process id stays taken."""
    ended = os.waitid(os.P_PID, trainer, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _become_trainer(folder: str, stdin: int, stdout: int) -> None:
    """Train in `folder`, in a process group of its own, and end this process."""
    status = 1
    try:
        os.setpgid(0, 0)
        log = os.open(Path(folder) / "trainer.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for source, target in ((stdin, 0), (stdout, 1), (log, 2)):
            os.dup2(source, target)
            os.close(source)
        os.chdir(folder)
        if DRIVER in Path("/proc/self/maps").read_text():
            os.execv(sys.executable, [sys.executable, "-m", "worker.trainer", folder])  # noqa: S606 - no shell
        status = run(Path(folder))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
