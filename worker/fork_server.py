"""`python -m worker.fork_server PROGRAM`: load a program's libraries once, then fork a process for each work folder.

PROGRAM is a package whose `__main__` has two functions. `load()` imports its libraries. `run(folder)` does the work
in a folder. It returns the exit status.

The standard input is a Unix socket of sequenced packets. A request is a line of JSON (`folder`, `log`, and maybe
`memory_bytes`) with three file descriptors: the standard input and output of the new process, and a control socket.
Two answers come through the control socket: the process id, and later the exit status. Whoever closes the other end
releases the process: it is killed, and its id is free from then on. Before, a late signal cannot hit another process.

Nothing here may use a GPU, because a forked process cannot use its parent's CUDA driver. If a library has loaded the
driver anyway, the fork starts a fresh interpreter.
"""

import gc
import importlib
import json
import os
import resource
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.spec.json_types import JsonObject

DRIVER = "libcuda.so"
"""The file name by which the CUDA driver shows in a process's memory map."""
Run = Callable[[Path], int]


@dataclass(eq=False)
class Forked:
    """A forked process, a file descriptor that becomes readable when it ends, and its control socket."""

    pid: int
    end: int
    control: socket.socket
    has_ended: bool = False

    def tell_status(self) -> None:
        """Send the exit status: −n for signal n. The process id stays reserved."""
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        self.has_ended = True
        with suppress(OSError):  # nobody waits for it any more
            self.control.send(str(status).encode())

    def release(self) -> None:
        """Kill the process and those that it started, and free its id."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.close()

    def close(self) -> None:
        os.close(self.end)
        self.control.close()


class Server:
    """Forks processes of a program on request, and watches them."""

    def __init__(self, program: str, run: Run, requests: socket.socket) -> None:
        self.program, self.run, self.requests = program, run, requests
        self.selector = selectors.DefaultSelector()
        self.children: set[Forked] = set()

    def serve(self) -> None:
        """Serve requests until their socket closes. The children live on, each until its standard input closes."""
        self.selector.register(self.requests, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.requests:
                    packet, descriptors, _, _ = socket.recv_fds(self.requests, 1 << 16, 3)
                    if not packet:
                        return
                    self._fork(json.loads(packet), *descriptors)
                elif key.data in self.children:
                    self._notice(key.data, key.fd)

    def _fork(self, request: JsonObject, stdin: int, stdout: int, control: int) -> None:
        pid = os.fork()
        if pid == 0:
            self._forget_others()
            os.close(control)
            _become(self.program, self.run, request, stdin, stdout)
        os.setpgid(pid, pid)  # the fork does it too: the group exists before the answer
        os.close(stdin)
        os.close(stdout)
        child = Forked(pid, os.pidfd_open(pid), socket.socket(fileno=control))
        self.children.add(child)
        self.selector.register(child.end, selectors.EVENT_READ, child)
        self.selector.register(child.control, selectors.EVENT_READ, child)
        with suppress(OSError):
            child.control.send(str(pid).encode())

    def _notice(self, child: Forked, descriptor: int) -> None:
        """A child has ended, or nobody wants it any more."""
        self.selector.unregister(descriptor)
        if descriptor == child.end:
            child.tell_status()
            return
        if not child.has_ended:
            self.selector.unregister(child.end)
        self.children.remove(child)
        child.release()

    def _forget_others(self) -> None:
        """In a fork: close what belongs to the server and to the other children."""
        self.selector.close()
        self.requests.close()
        for child in self.children:
            child.close()


def main() -> None:
    """Load the program of the command line, and serve requests."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = socket.socket(fileno=os.dup(0))
    program = importlib.import_module(f"{sys.argv[1]}.__main__")
    program.load()  # before the first request, so that no work waits for it
    gc.collect()
    gc.freeze()  # a garbage collection in a fork would copy every page that it visits
    Server(sys.argv[1], program.run, requests).serve()


def _become(program: str, run: Run, request: JsonObject, stdin: int, stdout: int) -> None:
    """Do the work of a request, in a process group of its own. Then end this process."""
    status = 1
    try:
        os.setpgid(0, 0)
        folder = request["folder"]
        log = os.open(Path(folder) / request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for source, target in ((stdin, 0), (stdout, 1), (log, 2)):
            os.dup2(source, target)
            os.close(source)
        os.chdir(folder)
        if (memory_bytes := request.get("memory_bytes")) is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
        if DRIVER in Path("/proc/self/maps").read_text():
            os.execv(sys.executable, [sys.executable, "-P", "-m", program, folder])  # noqa: S606 - no shell
        status = run(Path(folder))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
