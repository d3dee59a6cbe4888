"""A training method: rows in, a gradient or validation metrics out, and its own state.

A method takes rows by number, packs them, and gets scores from the policy. The loss of a step is the mean over its
rows; for SFT, over its scored tokens. It does not depend on the packs, nor on the parts in which the batch is
computed. Each part divides by the `Totals` of the whole batch.
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
    """A validation row and the log-probs of its responses, [K] each. A reward model's `logps` are rewards."""

    number: int
    logps: Tensor
    reference_logps: Tensor | None
    """None for a loss without a reference."""


@dataclass(frozen=True)
class TokenCounts:
    """Token counts of the packs of a step."""

    tokens: int
    """Distinct tokens, without padding."""
    slots: int
    """Tokens with padding."""
    scored: int
    """Scored tokens: the positions at which the head computes logits."""

    @classmethod
    def of(cls, packs: Sequence[Pack]) -> "TokenCounts":
        return cls(
            sum(pack.tokens for pack in packs),
            sum(pack.slots for pack in packs),
            sum(len(pack.targets) for pack in packs),
        )


@dataclass(frozen=True)
class Totals:
    """Totals over the whole batch of a step, by which the loss of each part of it divides."""

    rows: int
    scored_tokens: int
    """Scored tokens of all responses."""
    chosen_tokens: int
    """Scored tokens of the best response of each row."""
    logp_gradients: Mapping[int, Tensor] | None = None
    """If the loss couples rows: for each row number, ∂L/∂log π(y) of its responses, [K]."""

    @property
    def chosen_length(self) -> float:
        """Mean number of scored tokens of a best response."""
        return self.chosen_tokens / self.rows

    @classmethod
    def of(cls, rows: Rows, numbers: Sequence[int]) -> "Totals":
        """The totals of the batch of the rows `numbers`."""
        scored = rows.scored_tokens(numbers)
        return cls(len(numbers), sum(sum(counts) for counts in scored), sum(counts[0] for counts in scored))


class Method(ABC):
    """How a stage learns from its rows."""

    DROPOUT: ClassVar[bool] = False
    """Whether the adapter's dropout is active in training."""

    def __init__(self, policy: Policy, settings: Hyperparameters, train: Rows, validation: Rows) -> None:
        self.policy, self.train, self.validation = policy, train, validation

    # -- before a stage ------------------------------------------------------------------------------------------

    @staticmethod
    def prepare_rows(rows: Rows, settings: Hyperparameters, max_length: int) -> Rows:
        """The rows in the form that the loss needs. By default they are unchanged."""
        return rows

    @staticmethod
    def groups(rows: Rows, batch_size: int) -> list[list[int]]:
        """Groups of row numbers that stay together in the order of every epoch. By default each row is alone."""
        return [[number] for number in range(len(rows))]

    def begin(self, references: Callable[[float | None], References]) -> None:  # noqa: B027 - most methods need nothing here
        """Prepare for the first step.

        `references` computes the reference log-probs of all rows. Its argument is LD-DPO's weight of tails, or None.
        """

    # -- a step --------------------------------------------------------------------------------------------------

    def totals(self, numbers: Sequence[int], averages: Averages, *, divided: bool = False) -> Totals:
        """The totals of the batch of the training rows `numbers`. To be called before `backward`.

        `divided`: `backward` will be called for several parts of the batch instead of once for all of it.
        """
        return Totals.of(self.train, numbers)

    @abstractmethod
    def backward(self, numbers: Sequence[int], totals: Totals, averages: Averages) -> TokenCounts:
        """Accumulate the gradient of the training rows `numbers`, which are the whole batch or a part of it.

        `totals` are those of the whole batch. The gradient is multiplied by the policy's loss scale. Metrics are added
        to `averages`.
        """

    def after_step(self, step: int) -> None:  # noqa: B027 - most methods need nothing here
        """Called after optimizer step `step`, counted from 1."""

    # -- a validation --------------------------------------------------------------------------------------------

    @abstractmethod
    def validate(self, averages: Averages, check_stop: Callable[[], None]) -> list[ValidatedRow]:
        """Score all validation rows and add their metrics to `averages`. Calls `check_stop` after each pack."""

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The tensors that a checkpoint must keep beside the weights, by file name and tensor name."""
        return {}

    def load_state_dict(self, state: Mapping[str, dict[str, Tensor]], step: int) -> None:  # noqa: B027 - most methods need nothing here
        """Restore `state`, which `state_dict` returned after optimizer step `step`."""


def split_by_row(values: Tensor, row_of: Tensor, rows: int) -> list[Tensor]:
    """Split the `values` [R] of responses into one tensor per row, [K] each. `row_of` [R]: the row of each value."""
    counts = torch.bincount(row_of, minlength=rows).tolist()
    return list(torch.split(values, counts))
