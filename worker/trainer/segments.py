"""The canonical order of a step: which segments are summed, and in which order, on any number of devices.

A step's segments are dealt into virtual ranks of about equal size. A virtual rank adds its segments in order. The sums
of the virtual ranks are added in order. A real rank computes whole virtual ranks. So the sum has the same bits on one
device as on many (virtual ranks as in EasyScale, Li et al. 2023, and VirtualFlow, Or et al. 2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy
import torch
from torch import Tensor

from worker.trainer.packing import Segment


@dataclass(frozen=True)
class StepPlan:
    """The segments of a step, by virtual rank."""

    virtual_ranks: tuple[tuple[Segment, ...], ...]

    @classmethod
    def of(cls, segments: Sequence[Segment], count: int) -> "StepPlan":
        """Deal `segments` into at most `count` virtual ranks: the largest first, each to the one with fewest tokens.

        The virtual ranks are sorted by size, the largest first. Each has its segments in their given order.
        """
        count = min(count, len(segments))
        dealt, tokens = [list[int]() for _ in range(count)], [0] * count
        for number in sorted(range(len(segments)), key=lambda number: (-segments[number].tokens, number)):
            smallest = min(range(count), key=lambda k: (tokens[k], k))
            dealt[smallest].append(number)
            tokens[smallest] += segments[number].tokens
        order = sorted(range(count), key=lambda k: (-tokens[k], k))
        return cls(tuple(tuple(segments[number] for number in sorted(dealt[k])) for k in order))

    @cached_property
    def segments(self) -> list[Segment]:
        """All segments in canonical order: those of the first virtual rank, then those of the second, …"""
        return [segment for virtual_rank in self.virtual_ranks for segment in virtual_rank]

    @cached_property
    def first_places(self) -> list[int]:
        """The canonical number of the first segment of each virtual rank."""
        return list(accumulate((len(virtual_rank) for virtual_rank in self.virtual_ranks[:-1]), initial=0))

    @property
    def rows(self) -> list[int]:
        """The numbers of all rows in canonical order."""
        return [number for segment in self.segments for number in segment.rows]

    def rounds(self, rank: int, size: int) -> list[int | None]:
        """The virtual rank that the rank `rank` of `size` computes in each round; None where none is left for it.

        Round j is for the virtual ranks j · size to (j + 1) · size − 1. Every second round deals them backwards, so
        that no rank has the largest of each round.
        """
        count = -(-len(self.virtual_ranks) // size)  # rounded up
        places = [j * size + (rank if j % 2 == 0 else size - 1 - rank) for j in range(count)]
        return [place if place < len(self.virtual_ranks) else None for place in places]

    def parts(self, rank: int, size: int) -> list[tuple[Segment, ...]]:
        """The segments that the rank `rank` of `size` computes in each round."""
        return [() if number is None else self.virtual_ranks[number] for number in self.rounds(rank, size)]

    def in_order(self, values: Tensor, size: int) -> Tensor:
        """The `values` [R] of the responses of all rows in canonical order, given those of rank 0, then rank 1, …"""
        if size == 1:
            return values
        own = [number for rank in range(size) for number in self.rounds(rank, size) if number is not None]
        places = [self.first_places[number] + k for number in own for k in range(len(self.virtual_ranks[number]))]
        counts = [self.segments[place].responses for place in places]
        return values[torch.from_numpy(numpy.argsort(numpy.repeat(places, counts), kind="stable"))]
