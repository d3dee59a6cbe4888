"""A training method: rows in, a gradient or validation metrics out, and its own state.

A method takes rows by number and gives the launcher the loss of a pack. The loss of a step is the mean over its rows;
for SFT, over its scored tokens. It does not depend on the packs, nor on the ranks that compute them: each pack divides
by the `Totals` of the whole batch. Metrics are computed from the values of all rows of a step, in canonical order.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from torch import Tensor

from app.spec.hyperparameters import Hyperparameters
from worker.trainer.arrays import Shelf
from worker.trainer.averages import Averages
from worker.trainer.dataset import Groups, Rows
from worker.trainer.launcher import Launcher, TokenCounts, nothing
from worker.trainer.packing import Segment
from worker.trainer.reference import References
from worker.trainer.rollouts import Answer
from worker.trainer.segments import StepPlan

if TYPE_CHECKING:
    from worker.trainer.plan import Stage


class ValidatedRow(NamedTuple):
    """A validation row and the log-probs of its responses, [K] each. A reward model's `logps` are rewards.

    `answers`: those that the policy has written, if the responses are not in the row.
    """

    number: int
    logps: Tensor
    reference_logps: Tensor | None
    """None for a loss without a reference."""
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True)
class Totals:
    """Totals over the whole batch of a step, by which the loss of each part of it divides."""

    rows: int
    scored_tokens: int
    """Scored tokens of all responses."""
    chosen_tokens: int
    """Scored tokens of the best response of each row."""
    most_responses: int
    """The largest number of responses of a row, K."""

    @property
    def chosen_length(self) -> float:
        """Mean number of scored tokens of a best response."""
        return self.chosen_tokens / self.rows

    @classmethod
    def of(cls, rows: Rows, numbers: Sequence[int]) -> "Totals":
        """The totals of the batch of the rows `numbers`."""
        scored = rows.scored_tokens(numbers)  # [K] of each row
        tokens, chosen_tokens = sum(sum(counts) for counts in scored), sum(counts[0] for counts in scored)
        return cls(len(numbers), tokens, chosen_tokens, max(map(len, scored), default=0))


class Method(ABC):
    """How a stage learns from its rows."""

    DROPOUT: ClassVar[bool] = False
    """Whether the adapter's dropout is active in training."""

    def __init__(self, launcher: Launcher, settings: Hyperparameters, train: Rows, validation: Rows) -> None:
        self.launcher, self.policy = launcher, launcher.policy
        self.train, self.validation = train, validation
        self.merges = True
        """Whether rows with the same prompt share it. Then a response that two rows have is scored once."""
        self.check_stop: Callable[[], None] = nothing
        """Raises `Stopped` if this rank was asked to stop. For methods whose steps take long."""
        self._planned: tuple[Sequence[int], StepPlan] | None = None
        """The rows and the plan of the step that was prepared."""

    @classmethod
    def of(cls, launcher: Launcher, stage: "Stage") -> Self:
        """The method of `stage`."""
        return cls(launcher, stage.hyperparameters, stage.train, stage.validation)

    def segments(self, rows: Rows, numbers: Sequence[int]) -> Iterator[Segment]:
        """The rows `numbers` as segments."""
        return self.policy.segments(rows, numbers, merge=self.merges)

    # -- before a stage ------------------------------------------------------------------------------------------

    @staticmethod
    def prepare_rows(rows: Rows, settings: Hyperparameters, max_length: int, shelf: Shelf) -> Rows:
        """The rows in the form that the loss needs, on the `shelf`. By default they are unchanged."""
        return rows

    @staticmethod
    def groups(rows: Rows, batch_size: int) -> Groups:
        """Groups of row numbers that stay together in the order of every epoch. By default each row is alone."""
        return Groups.alone(len(rows))

    def begin(self, references: Callable[[float | None], References]) -> None:  # noqa: B027 - most methods need nothing here
        """Prepare for the first step.

        `references` computes the reference log-probs of all rows. Its argument is LD-DPO's weight of tails, or None.
        """

    # -- a step --------------------------------------------------------------------------------------------------

    def plan(self, numbers: Sequence[int]) -> StepPlan:
        """The segments of a step over the training rows `numbers`, in canonical order."""
        if self._planned is None or self._planned[0] != numbers:
            self._planned = numbers, self.launcher.plan(list(self.segments(self.train, numbers)))
        return self._planned[1]

    def prepare(self, numbers: Sequence[int]) -> None:
        """Plan the step after the current one, over the training rows `numbers`, and build its first pack."""
        self.launcher.prepare(self.plan(numbers))

    @abstractmethod
    def gradient(self, numbers: Sequence[int], averages: Averages, draw: str | None = None) -> TokenCounts:
        """Set the gradient of a step over the training rows `numbers`, times the policy's loss scale.

        Metrics are added to `averages`. `draw` seeds the random numbers of a step with dropout.
        """

    def tokens(self, numbers: Sequence[int]) -> int:
        """Distinct tokens of a step over the training rows `numbers`, after its gradient."""
        return self.train.tokens(numbers)

    def after_step(self, step: int) -> None:  # noqa: B027 - most methods need nothing here
        """Called after optimizer step `step`, counted from 1."""

    # -- a validation --------------------------------------------------------------------------------------------

    @abstractmethod
    def validate(self, averages: Averages, check_stop: Callable[[], None]) -> list[ValidatedRow]:
        """Score all validation rows and add their metrics to `averages`. Calls `check_stop` after each launch."""

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The tensors that a checkpoint must keep beside the weights, by file name and tensor name."""
        return {}

    def load_state_dict(self, state: Mapping[str, dict[str, Tensor]], step: int) -> None:  # noqa: B027 - most methods need nothing here
        """Restore `state`, which `state_dict` returned after optimizer step `step`."""
