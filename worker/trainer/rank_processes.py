"""The processes of a training on several devices, started and watched by torchrun's launcher.

The trainer's process forks a rank for each device of its machine and waits. The first rank of all reads the runner's
answers and writes the events. A rank that fails leaves the event that says why in the folder `ranks`, and the trainer
reports the earliest. When a rank dies, the others notice it within seconds. The launcher kills those that do not end
within 30 s. Then the trainer ends like the rank that died.

A rank gives signs of life, until it hangs (see `progress`). One that gives none is killed. Before that, all write their
stacks to the log.

Each rank ends when the trainer does. It holds a pipe whose other end only the trainer has. Over several machines, each
has a trainer of its own, and the launchers meet at a port of the first one.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import torch
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from worker.trainer.errors import STOPPED, first_line
from worker.trainer.events import Broken, Event, line, read
from worker.trainer.progress import progress

RANK, LOCAL_RANK = "RANK", "LOCAL_RANK"
"""The variables by which torchrun's launcher tells a process its rank, among all and among those of its machine."""
BEAT_SECONDS, SILENT_SECONDS = 1.0, 20.0
"""Each rank gives a sign of life every second. One that gives none for so long counts as hung, and is killed."""
STACKS_SECONDS = 0.5
"""How long a rank has to write its stacks."""
MEETING_SECONDS = 300
"""How long the launchers of several machines wait for each other."""


@dataclass(frozen=True)
class Machine:
    """The place of this machine among the `count` machines of a training.

    `endpoint` is the host and port at which their launchers meet. `interface` is this machine's network interface to
    the others, unless it is not known or the machine's environment names another.
    """

    number: int
    count: int
    endpoint: str
    interface: str | None


@dataclass(frozen=True)
class RankFolder:
    """The files that a rank leaves for the trainer: a sign of life with its process id, and the event that ended it."""

    path: Path

    @classmethod
    def of(cls, folder: Path, rank: int) -> "RankFolder":
        """The folder of a rank in the work folder `folder`. Ranks are numbered on each machine."""
        return cls(folder / "ranks" / str(rank))

    def fail(self, event: Event) -> None:
        """Keep the event that ends the run. A disk that is full may not take it, and then the rank just ends."""
        partial = self.path / "event.partial"
        with suppress(OSError):
            partial.write_text(line(event))
            partial.rename(self.path / "event.json")

    @property
    def failure(self) -> Event | None:
        """The event that ended the run."""
        path = self.path / "event.json"
        return read(path.read_text()) if path.exists() else None

    def beat(self) -> None:
        """Give a sign of life."""
        path = self.path / "beat"
        if not path.exists():
            path.write_text(str(os.getpid()))
        os.utime(path)  # it needs no room on the disk

    @property
    def silent_pid(self) -> int | None:
        """The process id of the rank if it has given no sign of life for too long."""
        path = self.path / "beat"
        if not path.exists() or time.time() - path.stat().st_mtime < SILENT_SECONDS:
            return None
        return int(path.read_text() or 0) or None


def launch(
    folder: Path, size: int, run_rank: Callable[[int, int], int], stopping: threading.Event, machine: Machine | None
) -> int:
    """Run `run_rank(rank, local rank)` in `size` processes.

    Returns 0 if all of them do, and `STOPPED` if they were asked to stop. SIGTERM is passed on to the ranks. If a
    signal ends one of them, it ends this process too. `machine` is None for a training on this machine alone.
    """
    for rank in range(size):
        RankFolder.of(folder, rank).path.mkdir(parents=True, exist_ok=True)
    read_end, write_end = os.pipe()

    def start() -> int:
        if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            assert not torch.cuda._is_in_bad_fork(), "the trainer has used the GPU's driver before it forked its ranks"
        os.close(write_end)
        progress.mark()  # the trainer's last mark is older
        rank, local_rank = int(os.environ[RANK]), int(os.environ[LOCAL_RANK])
        threading.Thread(target=_end_with_trainer, args=(read_end,), daemon=True).start()
        threading.Thread(target=_beat, args=(RankFolder.of(folder, local_rank),), daemon=True).start()
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        if rank > 0:
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.close(null)
        status = run_rank(rank, local_rank)
        if status not in (0, STOPPED):  # the launcher then ends the other ranks
            sys.stderr.flush()
            os._exit(status)
        return status

    trainer = os.getpid()

    def stop(*_: object) -> None:
        stopping.set()
        if os.getpid() == trainer:  # the ranks have this handler too
            for child in multiprocessing.active_children():
                child.terminate()

    signal.signal(signal.SIGTERM, stop)
    processes = set[BaseProcess]()
    threading.Thread(target=_watch, args=(folder, size, processes), daemon=True).start()
    # By itself, gloo takes the interface of the address that the machine's name has, which may have none.
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if machine is None:
            os.environ[name] = "lo"
        elif machine.interface is not None:
            os.environ.setdefault(name, machine.interface)
    # A process that has asked for GPUs cannot fork ranks that use them, and the configuration asks.
    with patch.object(torch.cuda, "is_available", return_value=False):
        config = LaunchConfig(
            min_nodes=1 if machine is None else machine.count,
            max_nodes=1 if machine is None else machine.count,
            nproc_per_node=size,
            run_id=folder.name if machine is None else machine.endpoint,
            rdzv_backend="c10d" if machine is None else "static",
            rdzv_endpoint="localhost:0" if machine is None else machine.endpoint,
            rdzv_configs={} if machine is None else {"rank": machine.number, "timeout": MEETING_SECONDS},
            local_addr="localhost" if machine is None else None,
            max_restarts=0,
            monitor_interval=0.1,
            start_method="fork",
            signals_to_handle="SIGHUP",  # SIGTERM is for `stop`
            logs_specs=DefaultLogsSpecs(log_dir=str(folder / "ranks")),
        )
    try:
        results: dict[int, int] = elastic_launch(config, start)()
        return max(results.values())
    except (DistNetworkError, DistStoreError) as error:  # the port is taken, or a machine cannot be reached
        reason = f"the launchers of the machines cannot meet: {first_line(error)}"
        RankFolder.of(folder, 0).fail(Broken(reason))
        return 1
    except ChildFailedError as error:
        statuses = [failed.exitcode for failed in error.failures.values()]
        statuses += [process.exitcode or 0 for process in processes]
        killed = next((-status for status in statuses if status < 0), None)
        if failure(folder, size) is None and killed is not None:
            print(f"a rank was ended by signal {killed}", file=sys.stderr, flush=True)
            if killed != signal.SIGKILL:
                signal.signal(killed, signal.SIG_DFL)
            os.kill(os.getpid(), killed)
        return 1
    finally:
        os.close(read_end)
        os.close(write_end)


def failure(folder: Path, size: int) -> Event | None:
    """The earliest event with which a rank failed."""
    failures = [event for rank in range(size) if (event := RankFolder.of(folder, rank).failure) is not None]
    return min(failures, key=lambda event: event.time, default=None)


def _end_with_trainer(pipe: int) -> None:
    os.read(pipe, 1)
    os._exit(1)


def _beat(folder: RankFolder) -> None:
    while True:
        if not progress.is_hung:
            with suppress(OSError):  # the next one may succeed
                folder.beat()
        time.sleep(BEAT_SECONDS)


def _watch(folder: Path, size: int, processes: set[BaseProcess]) -> None:
    """Kill a rank that gives no sign of life. All ranks write their stacks to the log first.

    `processes` gets the processes of the ranks.
    """
    folders, killed = [RankFolder.of(folder, rank) for rank in range(size)], set[int]()
    while len(processes) < size:  # until all have begun: each call reaps, beside the launcher
        processes.update(multiprocessing.active_children())
        time.sleep(0.02)
    while True:
        time.sleep(BEAT_SECONDS)
        silent = {rank: pid for rank, one in enumerate(folders) if (pid := one.silent_pid) is not None}
        for rank, pid in silent.items():
            if pid in killed:
                continue
            killed.add(pid)
            print(f"rank {rank} gives no sign of life", file=sys.stderr, flush=True)
            for process in processes:  # one after the other, because they share the log
                _send(process.pid, signal.SIGUSR1)  # it writes its stacks
                _send(process.pid, signal.SIGCONT)  # a frozen one does, too
                time.sleep(STACKS_SECONDS)
            _send(pid, signal.SIGKILL)


def _send(pid: int | None, number: int) -> None:
    """Send a signal to a rank, unless it has ended."""
    with suppress(ProcessLookupError):
        if pid is not None:
            os.kill(pid, number)
