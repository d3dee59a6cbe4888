"""A method of training: rows in, a gradient or validation metrics out, and a state of its own.

A method takes rows by number, packs them, and asks the policy for scores. The loss of a step is a mean over its rows
(for SFT: over its scored tokens), whatever packs they are in and whoever computes which part of them: what the mean
divides by is `Totals` of the whole batch, which each part is given.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from app.spec.hyperparameters import Hyperparameters
from worker.trainer.averages import Averages
from worker.trainer.dataset import Rows
from worker.trainer.model import Policy
from worker.trainer.packing import Pack
from worker.trainer.reference import References


class ValidatedRow(NamedTuple):
    """A validation row by its number: the log-probs of its responses, [K], and the reference's where there is one."""

    number: int
    logps: Tensor
    reference_logps: Tensor | None


@dataclass(frozen=True)
class Work:
    """Distinct tokens, places (with padding) and scored tokens of the packs of a step."""

    tokens: int
    places: int
    scored: int

    @classmethod
    def of(cls, packs: Sequence[Pack]) -> "Work":
        return cls(
            sum(pack.tokens for pack in packs),
            sum(pack.places for pack in packs),
            sum(len(pack.targets) for pack in packs),
        )


@dataclass(frozen=True)
class Totals:
    """Counts over the whole batch of a step, by which the loss of each part of it divides.

    `shares` is there where rows depend on each other: by row, ∂L/∂log π(y) of each of its responses, [K].
    """

    rows: int
    scored_tokens: int
    """The scored tokens of all responses."""
    chosen_tokens: int
    """Scored tokens of the best responses."""
    shares: Mapping[int, Tensor] | None = None

    @property
    def chosen_length(self) -> float:
        """Scored tokens of a best response, on average."""
        return self.chosen_tokens / self.rows

    @classmethod
    def of(cls, rows: Rows, batch: Sequence[int]) -> "Totals":
        """The counts of the rows `batch`."""
        scored = rows.scored_tokens(batch)
        return cls(len(batch), sum(sum(counts) for counts in scored), sum(counts[0] for counts in scored))


class Method(ABC):
    """How one stage learns from its rows."""

    DROPOUT: ClassVar[bool] = False
    """Whether the adapter's dropout acts while it trains."""

    def __init__(self, policy: Policy, settings: Hyperparameters, train: Rows, validation: Rows) -> None:
        self.policy, self.train, self.validation = policy, train, validation

    # -- before a stage ------------------------------------------------------------------------------------------

    @staticmethod
    def arranged(rows: Rows, settings: Hyperparameters, max_length: int) -> Rows:
        """The rows as the loss needs them; by default as they are."""
        return rows

    @staticmethod
    def groups(rows: Rows, batch_size: int) -> list[list[int]]:
        """Numbers of rows that stand together in every epoch; by default each stands alone."""
        return [[number] for number in range(len(rows))]

    def begin(self, references: Callable[[float | None], References]) -> None:  # noqa: B027 - most methods need nothing here
        """Get ready for the first step.

        `references` computes the reference log-probs of all rows, once, given the weight of tails (LD-DPO's).
        """

    # -- a step --------------------------------------------------------------------------------------------------

    def totals(self, batch: Sequence[int], averages: Averages, *, divided: bool = False) -> Totals:
        """The totals that each part of the training rows `batch` needs. `divided`: `backward` gets parts of it."""
        return Totals.of(self.train, batch)

    @abstractmethod
    def backward(self, rows: Sequence[int], totals: Totals, averages: Averages) -> Work:
        """Add to what trains the gradient of the part of the loss that the training rows `rows` have.

        `totals` are those of the whole batch. The gradient is times the policy's scale; metrics go to `averages`.
        """

    def after_step(self, step: int) -> None:  # noqa: B027 - most methods need nothing here
        """Optimizer step `step` (from 1) is done."""

    # -- a validation --------------------------------------------------------------------------------------------

    @abstractmethod
    def validate(self, averages: Averages, tick: Callable[[], None]) -> list[ValidatedRow]:
        """Validate: metrics go to `averages`; `tick` is called after each pack."""

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The tensors that a checkpoint must keep beside the weights, by the name of their file."""
        return {}

    def load_state_dict(self, state: Mapping[str, dict[str, Tensor]], step: int) -> None:  # noqa: B027 - most methods need nothing here
        """Go on from `state`, which was kept after optimizer step `step`."""


def split_by_row(values: Tensor, row_of: Tensor, rows: int) -> list[Tensor]:
    """`values` [R] of `rows` rows, one tensor a row. `row_of` [R] says whose each value is."""
    counts = torch.bincount(row_of, minlength=rows).tolist()
    return list(torch.split(values, counts))
