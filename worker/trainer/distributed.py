"""Ranks over `torch.distributed`: NCCL between GPUs, gloo between CPUs and for everything that is not a gradient."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from worker.trainer.errors import PeerLost
from worker.trainer.progress import progress
from worker.trainer.ranks import Ranks

Value = TypeVar("Value")
PATIENCE = timedelta(hours=6)
"""How long a rank waits for another one, which may tokenise a large file or write a large model meanwhile.

A rank that dies or is frozen ends the others within seconds, and one that hangs within half an hour (see
`rank_processes`).
"""


def is_peer_loss(error: BaseException) -> bool:
    """Whether `error`, from the engine's exchanges or from those of FSDP, says that another rank is gone."""
    if isinstance(error, (PeerLost, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    return type(error) is RuntimeError and "gloo/transport" in str(error)


@contextmanager
def lost_peers() -> Iterator[None]:
    """Within this context, each error that says that another rank is gone becomes `PeerLost`."""
    try:
        yield
    except Exception as error:
        if is_peer_loss(error):
            raise PeerLost(str(error).splitlines()[0]) from error
        raise


@contextmanager
def _peers() -> Iterator[None]:
    """Within this context this rank waits for others, and the errors of a lost connection become `PeerLost`."""
    try:
        with progress.waits():
            yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        raise PeerLost(str(error).splitlines()[0]) from error


def _waiter(work: dist.Work | None) -> Callable[[], None]:
    """A function that waits for `work`."""
    assert work is not None

    def wait() -> None:
        with _peers():
            work.wait()

    return wait


class DistributedRanks(Ranks):
    """A member of torch's default process group. Raises `PeerLost` when another member is gone."""

    def __init__(self, device: str) -> None:
        """Join the group that the environment describes, as torchrun does (`RANK`, `LOCAL_RANK`, `MASTER_ADDR` …).

        `device` is the kind of the ranks' devices, cpu or cuda.
        """
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = dist.get_node_local_rank()
        self._objects = dist.new_group(backend="gloo", timeout=PATIENCE)

    def gather(self, value: Value) -> list[Value]:
        values: list[Value | None] = [None] * self.size
        with _peers():
            dist.all_gather_object(values, value, group=self._objects)
        return values  # type: ignore[return-value]

    def gather_first(self, value: Value) -> list[Value] | None:
        values: list[Value | None] | None = [None] * self.size if self.is_first else None
        with _peers():
            dist.gather_object(value, values, group=self._objects)
        return values  # type: ignore[return-value]

    def of_first(self, make: Callable[[], Value]) -> Value:
        made = [make() if self.is_first else None]
        with _peers():
            dist.broadcast_object_list(made, group=self._objects)
        return made[0]  # type: ignore[return-value]

    def swap(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Callable[[], list[Tensor]]:
        sent, received = torch.cat(list(parts)), parts[0].new_empty(sum(sizes))
        sent_sizes = [part.numel() for part in parts]
        with _peers():
            arrived = _waiter(dist.all_to_all_single(received, sent, list(sizes), sent_sizes, async_op=True))

        def wait() -> list[Tensor]:
            arrived()
            return list(torch.split(received, list(sizes)))

        return wait

    def collect(self, whole: Tensor, part: Tensor) -> Callable[[], None]:
        with _peers():
            return _waiter(dist.all_gather_into_tensor(whole, part, async_op=True))

    def copy_from(self, rank: int, tensor: Tensor) -> None:
        with _peers():
            dist.broadcast(tensor, rank)

    def close(self) -> None:
        self.gather(None)
        dist.destroy_process_group()
