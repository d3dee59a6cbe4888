"""`python -m worker.trainer.fork_server`: load torch once, then fork a trainer for each job.

Its standard input is a Unix socket of sequenced packets. A request is the path of a work folder, with the trainer's
standard input and output as file descriptors. There are two answers: the trainer's process id, and later its exit
status. The process id stays reserved until the next request, so a late signal cannot hit another process.

Nothing here may use a GPU, because a forked process cannot use its parent's CUDA driver. If a library has loaded the
driver anyway, the fork starts a fresh interpreter.
"""

import gc
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from worker.trainer.__main__ import ENVIRONMENT, load_bitsandbytes, run

DRIVER = "libcuda.so"
"""The file name by which the CUDA driver shows in a process's memory map."""


def main() -> None:
    """Serve requests, one trainer at a time, until the socket closes."""
    os.environ.update(ENVIRONMENT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = socket.socket(fileno=os.dup(0))
    # Imported before the first request, so that no job waits for it.
    load_bitsandbytes()
    import worker.trainer.evaluation
    import worker.trainer.loop  # noqa: F401

    gc.collect()
    gc.freeze()  # a garbage collection in a fork would copy every page that it visits
    trainer: int | None = None
    while True:
        packet, descriptors, _, _ = socket.recv_fds(requests, 1 << 16, 2)
        if trainer is not None:
            os.waitpid(trainer, 0)  # releases the process id
        if not packet:
            return
        trainer = os.fork()
        if trainer == 0:
            requests.close()
            _become_trainer(packet.decode(), *descriptors)
        os.setpgid(trainer, trainer)  # the fork does it too: the group exists before the answer
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(str(trainer).encode())
        requests.send(str(_status_of(trainer)).encode())


def _status_of(trainer: int) -> int:
    """Wait for the exit status of a trainer: −n for signal n. Its process id stays reserved."""
    ended = os.waitid(os.P_PID, trainer, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _become_trainer(folder: str, stdin: int, stdout: int) -> None:
    """Train in `folder`, in its own process group. Then end this process."""
    status = 1
    try:
        os.setpgid(0, 0)
        log = os.open(Path(folder) / "trainer.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for source, target in ((stdin, 0), (stdout, 1), (log, 2)):
            os.dup2(source, target)
            os.close(source)
        os.chdir(folder)
        if DRIVER in Path("/proc/self/maps").read_text():
            os.execv(sys.executable, [sys.executable, "-P", "-m", "worker.trainer", folder])  # noqa: S606 - no shell
        status = run(Path(folder))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
