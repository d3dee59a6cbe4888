"""Which tokens of a pack see which.

A token sees the earlier tokens of its tree that belong to the prompt or to its own response. So the keys that a query
sees lie in two ranges of slots: a part of its prompt, and its own text up to itself. All masks are made from them.

tokens     P P P a a b b b        a prompt P with the responses a and b
prompt     - - - 0 0 0 0 0        the first slot of the prompt; a prompt's own tokens see it in the other range
end        - - - 3 3 3 3 3        the slot after its last one
own        0 0 0 3 3 5 5 5        the first slot of the own text

A sliding window counts distance in positions, not in slots. It moves the starts of both ranges.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.trainer.hardware import upload

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK_TOKENS = 128
"""Block size of the attention kernels."""


class Ranges(NamedTuple):
    """The keys that each slot sees: from `prompt` to before `end`, and from `own` to itself. [T] each."""

    prompt: Tensor
    end: Tensor
    own: Tensor

    def within(self, positions: Tensor, window: int | None) -> "Ranges":
        """The same in a sliding `window`: keys less than `window` positions before the query. `positions` [T]."""
        if window is None:
            return self
        slots = torch.arange(len(self.own), device=self.own.device, dtype=self.own.dtype)
        # A prompt's token at position p is in the slot `prompt` + p.
        prompt = torch.minimum(self.prompt + (positions - window + 1).clamp(min=0).to(self.end.dtype), self.end)
        return Ranges(prompt, self.end, torch.maximum(self.own, slots - window + 1))

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether the slots `queries` see the slots `keys`, in the shape that both broadcast to."""
        in_prompt = (keys >= self.prompt[queries]) & (keys < self.end[queries])
        return in_prompt | ((keys >= self.own[queries]) & (keys <= queries))

    def counts(self) -> Tensor:
        """How many keys each slot sees, [T]."""
        return self.end - self.prompt + torch.arange(len(self.own), device=self.own.device) - self.own + 1


@dataclass
class Blocks:
    """The mask of a pack in blocks of `BLOCK_TOKENS` slots, as FlexAttention's kernels read it.

    A full block needs no mask, a partial one does, any other is left out. For each row of blocks there is a number of
    blocks, [1, 1, n], and their indices come first in [1, 1, n, n]. `q_…` are those of the columns. `ranges` are those
    of the window that the mask is for.
    """

    ranges: Ranges
    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor
    block_mask: "BlockMask" = field(init=False)
    """The mask as FlexAttention takes it. It is made here and not on demand, because layers may be compiled."""

    def __post_init__(self) -> None:
        from torch.nn.attention.flex_attention import BlockMask

        length, ranges = len(self.ranges.own), self.ranges

        def mask_mod(_b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return ranges.visible(q, k)

        sizes = (BLOCK_TOKENS, BLOCK_TOKENS)
        self.block_mask = BlockMask((length, length), BLOCK_SIZE=sizes, mask_mod=mask_mod, **self._parts())

    def _parts(self) -> dict[str, Any]:
        """The counts and the indices by name."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("ranges", "block_mask")
        }

    @classmethod
    def of(cls, ranges: Ranges) -> "Blocks":
        """The blocks of a mask, counted on the CPU: T · T / `BLOCK_TOKENS` numbers, not T · T."""
        prompt, end, own = (part.numpy()[:, None] for part in ranges)  # (T, 1)
        slots = numpy.arange(len(prompt))[:, None]
        number = -(-len(prompt) // BLOCK_TOKENS)  # rounded up
        starts = numpy.arange(number) * BLOCK_TOKENS  # of the blocks of keys, (n,)

        def overlap(first: NDArray[numpy.int64], after: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
            """How many keys of each block are in a range, (T, n)."""
            ends = numpy.minimum(after, starts + BLOCK_TOKENS)
            counts: NDArray[numpy.int64] = numpy.maximum(ends - numpy.maximum(first, starts), 0)
            return counts

        seen = overlap(prompt, end) + overlap(own, slots + 1)  # keys of each block that a slot sees, (T, n)
        firsts = slots[::BLOCK_TOKENS, 0]
        most = numpy.maximum.reduceat(seen, firsts, axis=0)  # (n, n): rows of blocks of queries
        least = numpy.minimum.reduceat(seen, firsts, axis=0)
        # The last block may be cut off. FlexAttention masks its end itself, so it never counts as full.
        full = least == BLOCK_TOKENS
        partial = (most > 0) & ~full
        parts = (*_ordered(partial), *_ordered(full), *_ordered(partial.T), *_ordered(full.T))
        return cls(ranges, *parts)

    def to(self, device: torch.device) -> "Blocks":
        """The same on `device`."""
        ranges = Ranges(*(upload(part, device) for part in self.ranges))
        return Blocks(ranges, **{name: upload(part, device) for name, part in self._parts().items()})

    @property
    def computed(self) -> int:
        """Number of blocks that a kernel computes."""
        return int(self.kv_num_blocks.sum() + self.full_kv_num_blocks.sum())


def _ordered(dense: NDArray[numpy.bool_]) -> tuple[Tensor, Tensor]:
    """For each row of `dense` [n, n]: how many are true, [1, 1, n], and the columns with these first, [1, 1, n, n]."""
    counts = dense.sum(1, dtype=numpy.int32)
    columns = numpy.argsort(~dense, axis=1, kind="stable").astype(numpy.int32)
    return torch.from_numpy(counts)[None, None], torch.from_numpy(columns)[None, None]


@dataclass
class TreeMask:
    """The attention mask of a pack, for each sliding window that the model's layers have.

    `positions` [T]. `spans`: the (start, end) slots of each tree. `blocks`: the mask in blocks, by window.
    """

    ranges: Ranges
    positions: Tensor
    spans: tuple[tuple[int, int], ...]
    blocks: dict[int | None, Blocks]
    errors: list[float] | None = None
    """A list collects the error of the kernel with blocks, a number for each layer (see `attention.relative_error`)."""
    _tree_masks: dict[int | None, list[tuple[int, int, Tensor | None]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, ranges: Ranges, positions: Tensor, spans: tuple[tuple[int, int], ...], windows: Sequence[int | None]
    ) -> "TreeMask":
        """The mask, with its blocks for each of `windows`."""
        blocks = {window: Blocks.of(ranges.within(positions, window)) for window in windows}
        return cls(ranges, positions, spans, blocks)

    def to(self, device: torch.device) -> "TreeMask":
        """The same on `device`."""
        ranges = Ranges(*(upload(part, device) for part in self.ranges))
        blocks = {window: blocks.to(device) for window, blocks in self.blocks.items()}
        return TreeMask(ranges, upload(self.positions, device), self.spans, blocks)

    def tree_masks(self, window: int | None = None) -> list[tuple[int, int, Tensor | None]]:
        """(start slot, end slot, mask [1, 1, n, n]) of each tree of n tokens.

        The mask is None if plain causal attention is right for the tree.
        """
        if window not in self._tree_masks:
            ranges = self.ranges.within(self.positions, window)
            counts, masks = ranges.counts(), list[tuple[int, int, Tensor | None]]()
            for start, stop in self.spans:
                slots = torch.arange(start, stop, device=counts.device)  # (n,)
                plain = torch.equal(counts[start:stop], slots - start + 1)  # each slot sees all before it
                mask = None if plain else ranges.visible(slots[:, None], slots[None, :])[None, None]
                masks.append((start, stop, mask))
            self._tree_masks[window] = masks
        return self._tree_masks[window]
