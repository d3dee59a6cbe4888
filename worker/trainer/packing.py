"""Packs: many rows in one sequence, each prompt computed once for all its responses.

tokens     P P P a a b b b | Q Q c c d        two trees: prompt P with responses a and b, prompt Q with c and d
position   0 1 2 3 4 3 4 5 | 0 1 2 3 2        every response continues the positions of its prompt

Rows with the same prompt share a tree. A response that several of them have is in the tree once.

Rows are packed in two steps. First they are planned as segments of about `SEGMENT_TOKENS` tokens. These depend on the
rows alone, and the gradient of a step is summed segment by segment. Then a device computes as many segments in one pack
as fit its budget. So the budget, which depends on a device's memory, changes no bit of a gradient.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.trainer.data import Response, Row
from worker.trainer.hardware import upload
from worker.trainer.masks import BLOCK_TOKENS, Ranges, TreeMask

PLANNED_ROWS = 4096
"""Maximum number of rows planned together. Planning a whole data set at once would hold all of it in memory."""
SEGMENT_TOKENS = 1024
"""Size of a segment. Small segments spread a step evenly over many devices; each costs a product for each matrix."""
TREE_TOKENS = 4096
"""Maximum size of a tree of several rows. A segment cannot split a tree, so a device must have room for it."""
WIDTH_STEP = 1024
"""The widths of packs for kernels with blocks are multiples of it. GPUs choose other kernels for other widths."""
LEAST_ROWS = 16
"""The fewest rows of a matrix product. In smaller ones, a CPU computes a row with other bits than beside more rows."""


class Extent(NamedTuple):
    """Where a segment lies in its pack: its slots in B·T, and the responses of its rows in R."""

    slots: slice
    responses: slice


@dataclass(frozen=True)
class Pack:
    """The input of one forward pass. A slot is an index into its B·T tokens and padding.

    - By slot, [B, T]: `ids`; `positions`; `is_token`, false for padding.
    - By scored token, [N]: `predictors`, the flat slot in B·T that predicts it; `targets`, its token id; `leaf`, the
      index of its response; `order`, the number of scored tokens before it in this response.
    - By distinct response (leaf), [L]: `last`, the flat slot of its last token; `lengths`, its number of scored tokens.
    - By response of a row, [R], row after row: `leaves`, the index of the response; `row_of`, the index of the row in
      `rows`. R ≥ L, because rows may have responses in common.

    `rows` are the caller's row numbers. `places` [R, 2] has for each response of a row the number of the row, and which
    of its responses it is; this array stays on the CPU. `tokens` counts tokens without padding. `extents` are the
    segments' places. `mask` says which flat slots see which.
    """

    rows: tuple[int, ...]
    places: NDArray[numpy.int64]
    tokens: int
    extents: tuple[Extent, ...]
    mask: TreeMask
    ids: Tensor
    positions: Tensor
    is_token: Tensor
    predictors: Tensor
    targets: Tensor
    leaf: Tensor
    order: Tensor
    last: Tensor
    lengths: Tensor
    leaves: Tensor
    row_of: Tensor

    @property
    def slots(self) -> int:
        """Number of tokens, padding included: B·T."""
        return self.ids.numel()

    def to(self, device: torch.device) -> "Pack":
        """The pack with its tensors on `device`."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: upload(part, device) for name, part in parts.items() if isinstance(part, Tensor)}
        return Pack(**parts | moved | {"mask": self.mask.to(device)})


@dataclass(frozen=True)
class Tree:
    """A prompt with its distinct responses.

    `rows` holds for each row its number and the indices of its responses.
    """

    prompt: tuple[int, ...]
    responses: tuple[Response, ...]
    rows: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def tokens(self) -> int:
        """Number of tokens of the prompt and of all responses."""
        return len(self.prompt) + sum(len(response.ids) for response in self.responses)


@dataclass(frozen=True)
class Segment:
    """Trees whose part of a gradient is computed and added as one. Packs hold whole segments."""

    trees: tuple[Tree, ...]

    @cached_property
    def tokens(self) -> int:
        """Number of tokens of all trees."""
        return sum(tree.tokens for tree in self.trees)

    @property
    def rows(self) -> list[int]:
        """The numbers of its rows, in the order of its pack."""
        return [number for tree in self.trees for number, _ in tree.rows]

    @cached_property
    def responses(self) -> int:
        """Number of responses of all rows, R."""
        return sum(len(indices) for tree in self.trees for _, indices in tree.rows)


def trees(rows: Sequence[Row], numbers: Sequence[int], budget: int, *, merge: bool = True) -> list[Tree]:
    """The rows `numbers` as trees of at most `budget` tokens. A single row may exceed the budget.

    Rows without a prompt are not merged. With `merge=False` every row is its own tree.
    """
    grown_trees: list[Tree] = []
    open_trees: dict[tuple[int, ...], int] = {}  # prompt -> index of its latest tree
    for number in numbers:
        row = rows[number]
        index = open_trees.get(row.prompt) if merge and row.prompt else None
        grown = None if index is None else _grow(grown_trees[index], number, row)
        if index is not None and grown is not None and grown.tokens <= budget:
            grown_trees[index] = grown
        else:
            open_trees[row.prompt] = len(grown_trees)
            grown = _grow(Tree(row.prompt, (), ()), number, row, merge=merge)
            grown_trees.append(grown)
    return grown_trees


def _grow(tree: Tree, number: int, row: Row, *, merge: bool = True) -> Tree:
    """`tree` with one more row. Responses that it already has are not repeated."""
    responses, leaves = list(tree.responses), []
    for response in row.responses:
        if not merge or response not in responses:
            responses.append(response)
            leaves.append(len(responses) - 1)
        else:
            leaves.append(responses.index(response))
    return Tree(tree.prompt, tuple(responses), (*tree.rows, (number, tuple(leaves))))


def plan(trees: Sequence[Tree], budget: int) -> list[list[Tree]]:
    """Bins of trees that fit `budget` tokens, by best-fit decreasing. A larger tree has its own bin. Deterministic."""
    bins: list[list[Tree]] = []
    free: list[tuple[int, int]] = []  # (free tokens, bin), sorted: bisection finds the tightest fit
    for tree in sorted(trees, key=lambda tree: (-tree.tokens, tree.rows[0][0])):
        tightest = bisect_left(free, (tree.tokens, 0))
        if tightest < len(free):
            room, best = free.pop(tightest)
        else:
            room, best = budget, len(bins)
            bins.append([])
        bins[best].append(tree)
        insort(free, (room - tree.tokens, best))
    return bins


def plan_padded(trees: Sequence[Tree], budget: int) -> list[list[Tree]]:
    """Groups of trees of similar length, whose texts fit `budget` tokens when padded to the longest.

    A group of one tree may exceed the budget.
    """

    def width(tree: Tree) -> int:
        return len(tree.prompt) + max(len(response.ids) for response in tree.responses)

    groups: list[list[Tree]] = []
    texts = widest = 0
    for tree in sorted(trees, key=lambda tree: (-width(tree), tree.rows[0][0])):
        texts += len(tree.responses)
        if not groups or texts * widest > budget:
            groups.append([])
            texts, widest = len(tree.responses), width(tree)  # the longest text comes first
        groups[-1].append(tree)
    return groups


@dataclass(frozen=True)
class Packing:
    """How rows become segments, and segments packs.

    `budget` is the size of a pack in tokens. `joined`: a pack holds as many segments as fit the budget; otherwise it
    holds one. `shared`: responses share their prompt in a tree; otherwise each response is its own padded sequence, and
    packs hold one segment. `merge`: rows with the same prompt share a tree. `segment_tokens` is the size of a segment.

    `windows` is for attention kernels that work in blocks of `BLOCK_TOKENS` slots: the sliding windows of the layers,
    None among them for full attention. Packs then have masks in blocks. Each segment begins with a block, so its
    attention is the same in every pack. The width is a multiple of `WIDTH_STEP`.
    """

    budget: int
    shared: bool = True
    merge: bool = True
    joined: bool = True
    segment_tokens: int = SEGMENT_TOKENS
    windows: tuple[int | None, ...] = ()

    def segments(self, rows: Sequence[Row], numbers: Sequence[int]) -> Iterator[Segment]:
        """The rows `numbers` as segments, planned for `PLANNED_ROWS` rows at a time.

        They depend on the rows, on `shared`, `merge` and `segment_tokens`, and on nothing else.
        """
        for first in range(0, len(numbers), PLANNED_ROWS):
            merge = self.merge and self.shared  # without sharing, merging saves nothing
            planned = trees(rows, numbers[first : first + PLANNED_ROWS], TREE_TOKENS, merge=merge)
            groups = plan(planned, self.segment_tokens) if self.shared else plan_padded(planned, self.segment_tokens)
            yield from (Segment(tuple(group)) for group in groups)

    def groups(self, segments: Iterable[Segment]) -> Iterator[list[Segment]]:
        """Consecutive `segments` that share a pack. A segment larger than the budget is alone."""
        group, slots = list[Segment](), 0
        for segment in segments:
            size = self._slots(segment)
            if group and (not self.joined or not self.shared or slots + size > self.budget):
                yield group
                group, slots = [], 0
            group.append(segment)
            slots += size
        if group:
            yield group

    def _slots(self, segment: Segment) -> int:
        """The slots that a segment takes in a pack."""
        return _round_up(segment.tokens, BLOCK_TOKENS) if self.windows else segment.tokens

    def packs(self, rows: Sequence[Row], numbers: Sequence[int]) -> Iterator[Pack]:
        """The packs of the rows `numbers`, built one at a time."""
        return (self.build(group) for group in self.groups(self.segments(rows, numbers)))

    def build(self, group: Sequence[Segment]) -> Pack:
        """One pack with all segments of `group`."""
        if not self.shared:
            return padded_pack(group)
        slots = sum(self._slots(segment) for segment in group)
        if not self.windows:
            return tree_pack(group, max(slots, LEAST_ROWS))
        return tree_pack(group, _round_up(slots, WIDTH_STEP), self.windows)


def tree_pack(group: Sequence[Segment], width: int = 0, windows: Sequence[int | None] = ()) -> Pack:
    """A pack of one sequence [1, T] in which responses share their prompt. T is at least `width`.

    With `windows` each segment begins with a block, and the mask has blocks for them.
    """
    texts, extents, slot, response = list[_Text](), list[Extent](), 0, 0
    for segment in group:
        start = slot
        for tree in segment.trees:
            texts.append(_Text(0, slot, tree))
            slot += tree.tokens
        slot = _round_up(slot, BLOCK_TOKENS) if windows else slot
        extents.append(Extent(slice(start, slot), slice(response, response + segment.responses)))
        response += segment.responses
    return _build(group, texts, (1, max(width, slot)), extents, windows)


def padded_pack(group: Sequence[Segment]) -> Pack:
    """A pack with one sequence for each response, [L, T], padded on the right. Nothing is shared.

    It is for models whose layers cannot use a tree mask, such as recurrent ones, and for checking trees. A pack of
    several sequences has one segment, to which all slots belong.
    """
    pairs = [(tree, k) for segment in group for tree in segment.trees for k in range(len(tree.responses))]
    texts = [_Text(b, 0, tree, k) for b, (tree, k) in enumerate(pairs)]
    width = max(text.tokens for text in texts)
    extents, response = list[Extent](), 0
    for segment in group:
        extents.append(Extent(slice(0, len(texts) * width), slice(response, response + segment.responses)))
        response += segment.responses
    return _build(group, texts, (len(texts), width), extents)


class _Text(NamedTuple):
    """A tree in a pack: its sequence, its first slot in it, and the only response it has there; None for all."""

    sequence: int
    slot: int
    tree: Tree
    only: int | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens of the prompt and of its responses here."""
        tree, only = self.tree, self.only
        return tree.tokens if only is None else len(tree.prompt) + len(tree.responses[only].ids)


def _build(
    segments: Sequence[Segment],
    texts: Sequence[_Text],
    shape: tuple[int, int],
    extents: Sequence[Extent],
    windows: Sequence[int | None] = (),
) -> Pack:
    """The pack of `texts` in B sequences of T slots, where `shape` is (B, T)."""
    group, (_, width) = [tree for segment in segments for tree in segment.trees], shape
    # Number the distinct responses of all trees: leaf 0 … L − 1.
    *starts, count = accumulate((len(tree.responses) for tree in group), initial=0)
    first_leaf = {id(tree): start for tree, start in zip(group, starts, strict=True)}
    slots = shape[0] * width  # B·T
    ids, positions, prompt, end = (numpy.zeros(slots, dtype=numpy.int64) for _ in range(4))
    own, is_token = numpy.arange(slots), numpy.zeros(slots, dtype=bool)  # padding sees itself, so no softmax is empty
    last, lengths = (numpy.zeros(count, dtype=numpy.int64) for _ in range(2))  # (L,)
    predictors, targets, leaf, order, spans = [], [], [], [], []
    for text in texts:
        # The prompt.
        tree, length = text.tree, len(text.tree.prompt)
        start = text.sequence * width + text.slot
        slot = start + length  # the next free one
        ids[start:slot] = tree.prompt
        positions[start:slot] = numpy.arange(length)
        own[start:slot] = start
        # Its responses, each with positions that continue the prompt's.
        for k, response in enumerate(tree.responses):
            if text.only is not None and k != text.only:
                continue
            number, after = first_leaf[id(tree)] + k, slot + len(response.ids)
            tokens = numpy.asarray(response.ids, dtype=numpy.int64)
            ids[slot:after] = tokens
            positions[slot:after] = numpy.arange(length, length + len(tokens))
            prompt[slot:after], end[slot:after], own[slot:after] = start, start + length, slot
            before, scored = _predictors(response, slot, start, start + length)
            predictors.append(before[scored])
            targets.append(tokens[scored])
            lengths[number] = len(targets[-1])
            leaf.append(numpy.full(len(targets[-1]), number))
            order.append(numpy.arange(len(targets[-1])))
            slot, last[number] = after, after - 1
        is_token[start:slot] = True
        spans.append((start, slot))
    # The rows, each with the numbers of its responses.
    rows = [(number, [first_leaf[id(tree)] + k for k in indices]) for tree in group for number, indices in tree.rows]
    arrays = {
        "ids": ids.reshape(shape), "positions": positions.reshape(shape), "last": last, "lengths": lengths,
        "predictors": numpy.concatenate(predictors), "targets": numpy.concatenate(targets),
        "leaf": numpy.concatenate(leaf), "order": numpy.concatenate(order),
        "leaves": numpy.array([k for _, indices in rows for k in indices]),
        "row_of": numpy.array([index for index, (_, indices) in enumerate(rows) for _ in indices]),
    }  # fmt: skip
    tensors = {name: torch.from_numpy(array.astype(numpy.int64, copy=False)) for name, array in arrays.items()}
    ranges = Ranges(*(torch.from_numpy(part.astype(numpy.int32)) for part in (prompt, end, own)))
    mask = TreeMask.of(ranges, torch.from_numpy(positions), tuple(spans), windows)
    return Pack(
        rows=tuple(number for number, _ in rows),
        places=numpy.array([(number, k) for number, indices in rows for k in range(len(indices))]),
        tokens=sum(text.tokens for text in texts),
        extents=tuple(extents),
        mask=mask,
        is_token=torch.from_numpy(is_token.reshape(shape)),
        **tensors,
    )


def _round_up(number: int, step: int) -> int:
    """The least multiple of `step` that is not below `number`."""
    return -(-number // step) * step


def _predictors(
    response: Response, slot: int, prompt_start: int, prompt_end: int
) -> tuple[NDArray[numpy.int64], NDArray[numpy.bool_]]:
    """(the slot before each token of `response` in its text, whether the token is scored from there), [tokens] each.

    The first token of `response` is at `slot`. The last token of the prompt, before `prompt_end`, predicts it. Without
    a prompt, nothing predicts it.
    """
    before = numpy.arange(slot - 1, slot + len(response.ids) - 1)
    before[0] = prompt_end - 1
    return before, numpy.asarray(response.scored, dtype=bool) & (before >= prompt_start)


def columns(row_of: Tensor) -> Tensor:
    """The index of each response within its row, [R], for responses in row order: 0 0 0 1 1 → 0 1 2 0 1."""
    indices = torch.arange(len(row_of), device=row_of.device)
    starts = torch.ones_like(row_of, dtype=torch.bool)  # the first response of each row
    starts[1:] = row_of[1:] != row_of[:-1]
    return indices - torch.where(starts, indices, 0).cummax(0).values
