"""Ranks in the threads of one process, and trainings on them."""

import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from tests.helpers.trainer import Event, make_run, parse
from worker.trainer import loading, loop
from worker.trainer.loading import load_policy
from worker.trainer.ranks import Ranks

Value = TypeVar("Value")
PATIENCE = 60.0
"""Seconds after which a rank that waits for another one fails its test."""


@dataclass
class Meeting:
    """The place where `size` threads exchange what they have."""

    size: int
    barrier: threading.Barrier = field(init=False)
    values: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier, self.values = threading.Barrier(self.size, timeout=PATIENCE), [None] * self.size


class ThreadRanks(Ranks):
    """A rank in a thread."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, meeting.size, meeting

    def gather(self, value: Value) -> list[Value]:
        self._meeting.values[self.rank] = value
        self._meeting.barrier.wait()
        values = deepcopy(self._meeting.values)  # as if it had come from another process
        self._meeting.barrier.wait()
        return values

    def swap(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Callable[[], list[Tensor]]:
        received = [parts_of_rank[self.rank] for parts_of_rank in self.gather([part.clone() for part in parts])]
        assert [part.numel() for part in received] == list(sizes)
        return lambda: received

    def copy_from(self, rank: int, tensor: Tensor) -> None:
        tensor.copy_(self.gather(tensor.clone())[rank])


def on_ranks(size: int, work: Callable[[ThreadRanks], Value]) -> list[Value]:
    """The results of `work` on each of `size` ranks. If one fails, all fail."""
    meeting = Meeting(size)

    def run(rank: int) -> Value:
        try:
            return work(ThreadRanks(rank, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return [future.result() for future in futures]


def train_on_ranks(folder: Path, size: int, budget: int) -> list[Event]:
    """Run the trainer over `folder` on `size` ranks with packs of `budget` tokens. Returns the first one's events."""
    streams, lock = [io.StringIO() for _ in range(size)], threading.Lock()

    def load_alone(*arguments: Any) -> Any:
        with lock:  # the threads share torch's generator of random numbers
            return load_policy(*arguments)

    def train(ranks: ThreadRanks) -> None:
        run = make_run(folder, streams[ranks.rank], ranks=ranks)
        with torch.autograd.set_multithreading_enabled(False):
            loop.train(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "CPU_BUDGET", budget)
        patch.setattr(loop, "load_policy", load_alone)
        on_ranks(size, train)
    return parse(streams[0])
