"""Packs: many rows in one sequence, each prompt computed once for all the responses that hang on it.

tokens     P P P a a b b b | Q Q c c d        two rows, two responses each
position   0 1 2 3 4 3 4 5 | 0 1 2 3 2        a response goes on where its prompt ends
branch     0 0 0 1 1 2 2 2 | 0 0 1 1 2        0 is the prompt
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.trainer.data import Row


@dataclass(frozen=True)
class Pack:
    """What one forward pass computes.

    Shapes: `ids`, `positions` [B, T]; `row`, `branch` [B, T] (row −1 is padding); `predictors`, `targets`,
    `response` [N], one entry for each scored token: the flat index in B·T of the position that predicts it, its
    id, and which of the pack's responses it belongs to. `rows` are the caller's numbers of the rows, in order.
    """

    rows: tuple[int, ...]
    responses: int
    ids: Tensor
    positions: Tensor
    row: Tensor
    branch: Tensor
    predictors: Tensor
    targets: Tensor
    response: Tensor

    def to(self, device: torch.device) -> "Pack":
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Pack(self.rows, self.responses, **moved)


def plan(rows: Sequence[Row], numbers: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: lists of row numbers whose tokens fit `budget`; a longer row is alone.

    Deterministic in its arguments. Every number of `numbers` is in exactly one list.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, bin), sorted: the tightest fit is found by bisection
    for number in sorted(numbers, key=lambda n: (-rows[n].tokens, n)):
        size = rows[number].tokens
        at = bisect_left(free, (size, 0))
        if at < len(free):
            room, best = free.pop(at)
        else:
            room, best = budget, len(bins)
            bins.append([])
        bins[best].append(number)
        insort(free, (room - size, best))
    return bins


def tree_pack(rows: Sequence[Row], numbers: Sequence[int]) -> Pack:
    """The rows `numbers` as one sequence [1, T] in which responses share their prompt."""
    return _build(rows, numbers, [[(number, None) for number in numbers]])


def padded_pack(rows: Sequence[Row], numbers: Sequence[int]) -> Pack:
    """The rows `numbers` as one sequence [B, T] for each response, padded on the right: nothing is shared.

    For models whose layers cannot take a tree (recurrent ones, for instance), and to check a tree against.
    """
    return _build(rows, numbers, [[(n, k)] for n in numbers for k in range(len(rows[n].responses))])


def _build(rows: Sequence[Row], numbers: Sequence[int], sequences: list[list[tuple[int, int | None]]]) -> Pack:
    first_response: dict[int, int] = {}
    responses = 0
    for number in numbers:
        first_response[number] = responses
        responses += len(rows[number].responses)
    columns: list[dict[str, list[int]]] = []
    predictors: list[tuple[int, int]] = []
    targets: list[int] = []
    response_of: list[int] = []
    for b, sequence in enumerate(sequences):
        column: dict[str, list[int]] = {"ids": [], "positions": [], "row": [], "branch": []}
        for local, (number, only) in enumerate(sequence):
            row = rows[number]
            start, length = len(column["ids"]), len(row.prompt)
            column["ids"] += row.prompt
            column["positions"] += range(length)
            column["branch"] += [0] * length
            for k, response in enumerate(row.responses):
                if only is not None and k != only:
                    continue
                begin = len(column["ids"])
                for j, (target, scored) in enumerate(zip(response.ids, response.scored, strict=True)):
                    # The token before the first one is the prompt's last; without a prompt nothing predicts it.
                    predictor = begin + j - 1 if j else start + length - 1
                    if scored and predictor >= start:
                        predictors.append((b, predictor))
                        targets.append(target)
                        response_of.append(first_response[number] + k)
                column["ids"] += response.ids
                column["positions"] += range(length, length + len(response.ids))
                column["branch"] += [k + 1] * len(response.ids)
            column["row"] += [local] * (len(column["ids"]) - start)
        columns.append(column)
    width = max(len(column["ids"]) for column in columns)
    fill = {"ids": 0, "positions": 0, "row": -1, "branch": 0}
    tensors = {
        name: torch.tensor([c[name] + [value] * (width - len(c[name])) for c in columns])
        for name, value in fill.items()
    }
    return Pack(
        tuple(numbers),
        responses,
        **tensors,
        predictors=torch.tensor([b * width + t for b, t in predictors], dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        response=torch.tensor(response_of, dtype=torch.long),
    )
