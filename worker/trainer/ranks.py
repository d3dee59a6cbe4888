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

    @property
    def is_first(self) -> bool:
        """Whether this rank reports, keeps checkpoints and writes the artifact."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order. Tensors in them must be on the CPU."""
        return [value]

    def gather_first(self, value: Value) -> list[Value] | None:
        """The values of all ranks, on the first rank; None on the others."""
        return self.gather(value)

    def of_first(self, make: Callable[[], Value]) -> Value:
        """What `make` returns on the first rank. The others wait for it and do not call `make`."""
        return make()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return any(self.gather(flag))

    def swap(self, parts: Sequence[Tensor], received: Sequence[Tensor]) -> Callable[[], None]:
        """Begin to send `parts[k]` to rank k, and to fill `received[k]` from it. All are flat and of one dtype.

        The function that it returns waits until `received` is filled.
        """
        received[0].copy_(parts[0])
        return lambda: None

    def copy_from(self, rank: int, tensor: Tensor) -> None:
        """Overwrite `tensor` by that of the rank `rank`."""
