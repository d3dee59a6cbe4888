"""Ranks: the processes that train one policy together, each with a device of its own.

All ranks run the same program on the same spec, and call the methods of `Ranks` in the same order. Between two calls
they compute different segments.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

Value = TypeVar("Value")


class Ranks:
    """A rank alone. Its subclasses are members of larger groups."""

    rank = 0
    size = 1
    local_rank = 0
    """Its number among the ranks of its machine, which share a work folder."""

    @property
    def is_first(self) -> bool:
        """Whether this rank reports, keeps checkpoints and writes the artifact."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order. Tensors in them must be on the CPU."""
        return [value]

    def gather_first(self, value: Value) -> list[Value] | None:
        """The values of all ranks, on the first rank; None on the others."""
        values = self.gather(value)
        return values if self.is_first else None

    def of_first(self, make: Callable[[], Value]) -> Value:
        """The result of `make` on the first rank. The others wait for it and do not call `make`."""
        return self.gather(make() if self.is_first else None)[0]  # type: ignore[return-value]

    def first_then_others(self, make: Callable[[], Value]) -> Value:
        """The result of `make` on this rank. The first rank of each machine calls it, then the others.

        They find what the first one has left in the work folder.
        """
        made = [make()] if self.local_rank == 0 else []
        self.gather(None)
        return made[0] if made else make()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return any(self.gather(flag))

    def swap(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Callable[[], list[Tensor]]:
        """Begin to send `parts[k]` to rank k, and to receive `sizes[k]` elements from it. All are flat, of one dtype.

        The function that it returns waits for what was sent here, and returns it by rank.
        """
        return lambda: list(parts)

    def collect(self, whole: Tensor, part: Tensor) -> Callable[[], None]:
        """Begin to fill `whole` with the `part` of each rank, in their order. All are flat and equally long.

        The function that it returns waits until `whole` is complete.
        """
        whole.copy_(part)
        return lambda: None

    def copy_from(self, rank: int, tensor: Tensor) -> None:
        """Overwrite `tensor` by that of the rank `rank`."""

    def close(self) -> None:
        """Wait until all ranks are done, and leave the group."""
