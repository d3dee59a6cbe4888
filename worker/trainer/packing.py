"""Packs: many rows in one sequence, each prompt computed once for all the responses that hang on it.

tokens     P P P a a b b b | Q Q c c d        two trees: prompt P with responses a and b, prompt Q with c and d
position   0 1 2 3 4 3 4 5 | 0 1 2 3 2        a response goes on where its prompt ends
branch     0 0 0 1 1 2 2 2 | 0 0 1 1 2        0 is the prompt

Rows of one prompt share a tree, and a response that several of them have is in it once.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy
import torch
from torch import Tensor

from worker.trainer.data import Response, Row

WINDOW = 4096
"""Rows that are planned together, at most: a plan of a whole data set would need all of it in memory."""
BLOCK = 128
"""Attention kernels work on blocks of this many tokens; a pack of a fixed width is a multiple of it."""


@dataclass(frozen=True)
class Pack:
    """What one forward pass computes.

    Shapes: `ids`, `positions` [B, T]; `tree`, `branch` [B, T] (tree −1 is padding). For each of the N scored
    tokens: `predictors` [N], the flat index in B·T of the position that predicts it; `targets` [N], its id; `leaf`
    [N], which response of the pack it belongs to; `order` [N], how many scored tokens of it come before. For
    each of the L distinct responses: `last` [L], the flat index of its last token; `lengths` [L], scored tokens.
    `rows` are the caller's numbers of the rows, in order, and `leaves` [R] the response of each of theirs, row by
    row; `row_of` [R] says which row that is. `tokens` counts what is not padding. `spans` are the
    (first place, place behind the last) of each tree of a pack of one sequence.
    """

    rows: tuple[int, ...]
    tokens: int
    spans: tuple[tuple[int, int], ...]
    ids: Tensor
    positions: Tensor
    tree: Tensor
    branch: Tensor
    predictors: Tensor
    targets: Tensor
    leaf: Tensor
    order: Tensor
    last: Tensor
    lengths: Tensor
    leaves: Tensor
    row_of: Tensor

    @property
    def places(self) -> int:
        """Tokens and padding."""
        return self.ids.numel()

    def to(self, device: torch.device) -> "Pack":
        """The same on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rows", "tokens", "spans")}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


@dataclass(frozen=True)
class Tree:
    """A prompt with the distinct responses that hang on it; of each row, its number and which of them it has."""

    prompt: tuple[int, ...]
    responses: tuple[Response, ...]
    rows: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(len(response.ids) for response in self.responses)


def trees(rows: Sequence[Row], numbers: Sequence[int], budget: int, *, merge: bool = True) -> list[Tree]:
    """The rows `numbers` as trees of at most `budget` tokens each, unless one row alone has more.

    Without `merge` each row is a tree by itself.
    """
    made: list[Tree] = []
    open_trees: dict[tuple[int, ...], int] = {}
    for number in numbers:
        row = rows[number]
        at = open_trees.get(row.prompt) if merge and row.prompt else None
        grown = None if at is None else _grow(made[at], number, row)
        if at is not None and grown is not None and grown.tokens <= budget:
            made[at] = grown
        else:
            open_trees[row.prompt] = len(made)
            grown = _grow(Tree(row.prompt, (), ()), number, row, merge=merge)
            made.append(grown)
    return made


def _grow(tree: Tree, number: int, row: Row, *, merge: bool = True) -> Tree:
    responses, leaves = list(tree.responses), []
    for response in row.responses:
        if not merge or response not in responses:
            responses.append(response)
            leaves.append(len(responses) - 1)
        else:
            leaves.append(responses.index(response))
    return Tree(tree.prompt, tuple(responses), (*tree.rows, (number, tuple(leaves))))


def plan(trees: Sequence[Tree], budget: int) -> list[list[Tree]]:
    """Best-fit decreasing: lists of trees whose tokens fit `budget`; a larger tree is alone. Deterministic."""
    bins: list[list[Tree]] = []
    free: list[tuple[int, int]] = []  # (room, bin), sorted: the tightest fit is found by bisection
    for tree in sorted(trees, key=lambda tree: (-tree.tokens, tree.rows[0][0])):
        at = bisect_left(free, (tree.tokens, 0))
        if at < len(free):
            room, best = free.pop(at)
        else:
            room, best = budget, len(bins)
            bins.append([])
        bins[best].append(tree)
        insort(free, (room - tree.tokens, best))
    return bins


def plan_padded(trees: Sequence[Tree], budget: int) -> list[list[Tree]]:
    """Trees of similar length together: lists whose texts, padded to the longest, fit `budget`; or one tree."""

    def width(tree: Tree) -> int:
        return len(tree.prompt) + max(len(response.ids) for response in tree.responses)

    groups: list[list[Tree]] = []
    texts = widest = 0
    for tree in sorted(trees, key=lambda tree: (-width(tree), tree.rows[0][0])):
        texts += len(tree.responses)
        if not groups or texts * widest > budget:
            groups.append([])
            texts, widest = len(tree.responses), width(tree)
        groups[-1].append(tree)
    return groups


@dataclass(frozen=True)
class Packing:
    """How rows become packs.

    `budget` is in tokens. `shared`: as trees, else one sequence a response, padded. `merge`: rows of one prompt
    share a tree. `fixed`: the width is an eighth of the budget, or twice that, … up to the budget, so that
    compiled kernels see few shapes.
    """

    budget: int
    shared: bool = True
    merge: bool = True
    fixed: bool = False

    def packs(self, rows: Sequence[Row], numbers: Sequence[int]) -> Iterator[Pack]:
        """The rows `numbers`, one pack at a time, planned in windows of `WINDOW` rows."""
        for first in range(0, len(numbers), WINDOW):
            merge = self.merge and self.shared  # where nothing is shared there is nothing to gain
            window = trees(rows, numbers[first : first + WINDOW], self.budget, merge=merge)
            groups = plan(window, self.budget) if self.shared else plan_padded(window, self.budget)
            for group in groups:
                yield self.build(group)

    def build(self, group: Sequence[Tree]) -> Pack:
        """One pack of all of `group`."""
        return tree_pack(group, self._width(group)) if self.shared else padded_pack(group)

    def _width(self, group: Sequence[Tree]) -> int:
        tokens = sum(tree.tokens for tree in group)
        if not self.fixed:
            return tokens
        step = max(BLOCK, self.budget // 8 // BLOCK * BLOCK)
        return -(-tokens // step) * step


def tree_pack(group: Sequence[Tree], width: int = 0) -> Pack:
    """Trees as one sequence [1, T] in which responses share their prompt; T is `width` where that is more."""
    return _build(group, [[(tree, None) for tree in group]], width)


def padded_pack(group: Sequence[Tree]) -> Pack:
    """Trees as one sequence for each response, [L, T], padded on the right: nothing is shared.

    For models whose layers cannot take a tree (recurrent ones, for instance), and to check a tree against.
    """
    return _build(group, [[(tree, k)] for tree in group for k in range(len(tree.responses))], 0)


def _build(group: Sequence[Tree], sequences: list[list[tuple[Tree, int | None]]], width: int) -> Pack:
    first_leaf: dict[int, int] = {}
    count = 0
    for tree in group:
        first_leaf[id(tree)] = count
        count += len(tree.responses)
    sizes = [sum(_tokens(tree, only) for tree, only in sequence) for sequence in sequences]
    width = max(width, *sizes)
    shape = (len(sequences), width)
    ids, positions, branch = (numpy.zeros(shape, dtype=numpy.int64) for _ in range(3))
    tree_of = numpy.full(shape, -1, dtype=numpy.int64)
    predictors, targets, leaf, order, spans = [], [], [], [], []
    last = numpy.zeros(count, dtype=numpy.int64)
    lengths = numpy.zeros(count, dtype=numpy.int64)
    for b, sequence in enumerate(sequences):
        at = 0
        for local, (tree, only) in enumerate(sequence):
            start, length = at, len(tree.prompt)
            ids[b, at : at + length] = tree.prompt
            positions[b, at : at + length] = numpy.arange(length)
            at += length
            for k, response in enumerate(tree.responses):
                if only is not None and k != only:
                    continue
                number, size = first_leaf[id(tree)] + k, len(response.ids)
                tokens = numpy.asarray(response.ids, dtype=numpy.int64)
                ids[b, at : at + size] = tokens
                positions[b, at : at + size] = numpy.arange(length, length + size)
                branch[b, at : at + size] = k + 1
                # The token before the first one is the prompt's last; without a prompt nothing predicts it.
                before = numpy.arange(at - 1, at + size - 1)
                before[0] = start + length - 1
                scored = numpy.asarray(response.scored, dtype=bool) & (before >= start)
                predictors.append(b * width + before[scored])
                targets.append(tokens[scored])
                lengths[number] = len(targets[-1])
                leaf.append(numpy.full(len(targets[-1]), number))
                order.append(numpy.arange(len(targets[-1])))
                at += size
                last[number] = b * width + at - 1
            tree_of[b, start:at] = local
            spans.append((start, at))
    rows = [(number, [first_leaf[id(tree)] + k for k in mine]) for tree in group for number, mine in tree.rows]
    arrays = {
        "ids": ids,
        "positions": positions,
        "tree": tree_of,
        "branch": branch,
        "predictors": numpy.concatenate(predictors),
        "targets": numpy.concatenate(targets),
        "leaf": numpy.concatenate(leaf),
        "order": numpy.concatenate(order),
        "last": last,
        "lengths": lengths,
        "leaves": numpy.array([k for _, mine in rows for k in mine]),
        "row_of": numpy.array([at for at, (_, mine) in enumerate(rows) for _ in mine]),
    }
    tensors = {name: torch.from_numpy(array.astype(numpy.int64, copy=False)) for name, array in arrays.items()}
    return Pack(tuple(number for number, _ in rows), sum(sizes), tuple(spans), **tensors)


def _tokens(tree: Tree, only: int | None) -> int:
    return tree.tokens if only is None else len(tree.prompt) + len(tree.responses[only].ids)


def columns(row_of: Tensor) -> Tensor:
    """For responses in order, row by row, which of its row's each is: 0 0 0 1 1 → 0 1 2 0 1."""
    places = torch.arange(len(row_of), device=row_of.device)
    starts = torch.ones_like(row_of, dtype=torch.bool)
    starts[1:] = row_of[1:] != row_of[:-1]
    return places - torch.where(starts, places, 0).cummax(0).values
