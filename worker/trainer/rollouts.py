"""Rollouts: the answers that a policy writes to some prompts, their rewards, and their log-probs.

Random numbers depend on the seed, the batch, the prompt and the number of the answer. Batches are the same on any
number of devices. So a resumed run writes the same answers.

Answers are flat: M of them, those of the first prompt first. All their T tokens are flat too, in this order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from typing import Self

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.trainer import data, decoding
from worker.trainer.data import Response, Row
from worker.trainer.dataset import Rows
from worker.trainer.errors import Stopped
from worker.trainer.grading import Grading
from worker.trainer.hardware import hardware
from worker.trainer.launcher import Launcher, Values
from worker.trainer.model import Policy
from worker.trainer.packing import TREE_TOKENS, Pack, Segment
from worker.trainer.sampling import (
    Completion,
    CompletionRequest,
    Sampling,
    batches,
    end_tokens,
    sample_together,
    text_of,
)
from worker.trainer.tasks import Task


@dataclass(frozen=True)
class Answer:
    """An answer and its grade. `logp` is its log-prob by the sampler. `reward` is None if it could not be graded."""

    ids: tuple[int, ...]
    ended: bool
    logp: float
    text: str
    reward: float | None
    error: str | None = None


@dataclass(frozen=True)
class AnswerRows:
    """Answers as rows of a pack. `members` has for each row the numbers of its answers."""

    rows: Rows
    members: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tasks: Sequence[Task], answers: Sequence[Answer], members: Sequence[tuple[int, Sequence[int]]]) -> Self:
        """Rows for `members`: (number of the task, numbers of its answers)."""

        def row(number: int, task: int, numbers: Sequence[int]) -> Row:
            ids = [answers[k].ids for k in numbers]
            return Row(number, tasks[task].prompt.ids, tuple(Response(part, (True,) * len(part)) for part in ids))

        rows = Rows.of(row(number, task, numbers) for number, (task, numbers) in enumerate(members))
        return cls(rows, tuple(tuple(numbers) for _, numbers in members))

    def segments(self, policy: Policy) -> list[Segment]:
        """All rows as segments. Equal answers count as often as they are there."""
        return list(policy.segments(self.rows, range(len(self.rows)), merge=False))

    def answers(self, places: NDArray[numpy.int64]) -> list[int]:
        """The numbers of the answers at `places` [R, 2] of a pack: row, and response of the row."""
        return [self.members[row][k] for row, k in places.tolist()]

    def of_segments(self, segments: Sequence[Segment]) -> list[int]:
        """The numbers of the answers of `segments`, in the order of their packs."""
        return [number for segment in segments for row in segment.rows for number in self.members[row]]


class TokenValues:
    """A number for each token of all answers, on the CPU: `flat` [T]. `ends` [M + 1] are the bounds of the answers."""

    def __init__(self, flat: Tensor, lengths: Sequence[int]) -> None:
        self.flat, self.lengths, self.ends = flat, list(lengths), [0, *accumulate(lengths)]

    def of(self, answers: Sequence[int]) -> Tensor:
        """The numbers of the tokens of some answers, one after the other."""
        return torch.cat([self.flat[self.ends[k] : self.ends[k + 1]] for k in answers])

    def sums(self) -> Tensor:
        """The sum over the tokens of each answer, [M], in float64."""
        return torch.stack([part.sum() for part in torch.split(self.flat.double(), self.lengths)])


def write_answers(
    policy: Policy,
    launcher: Launcher,
    tasks: Sequence[Task],
    samples: int,
    max_tokens: int,
    draw: str,
    grading: Grading,
    check_stop: Callable[[], None],
) -> list[Answer]:
    """`samples` answers to each of `tasks`, graded, those of a task together. `draw` seeds the random numbers.

    The ranks share the work. Raises `Stopped` on all of them if one was asked to stop.
    """
    chosen, ranks = hardware(policy.device), launcher.ranks
    seed = int.from_bytes(sha256(draw.encode()).digest()[:7])
    sampling, ends = Sampling(max_tokens=max_tokens, seed=seed), end_tokens(policy, policy.ends)
    requests = [CompletionRequest(row, k, task.prompt.ids) for row, task in enumerate(tasks) for k in range(samples)]
    largest = 1 if policy.one_by_one else chosen.sampled_answers
    written = dict[tuple[int, int], Completion]()
    with policy.plain_layers():
        for together in data.batched(batches(requests, chosen.sampled_tokens, max_tokens, largest), ranks.size):
            sampled = sample_together(policy, together, sampling, ends, ranks, check_stop)
            if sampled.stopped:
                raise Stopped
            written |= {(completion.row, completion.sample): completion for completion in sampled.completions}
    completions = [written[row, k] for row in range(len(tasks)) for k in range(samples)]
    answered = [
        (task, text_of(policy, completion, task.prompt, task.example))
        for completion in completions
        for task in [tasks[completion.row]]
    ]
    return [
        Answer(
            one.ids, one.ended, one.logp, text, given.reward, None if given.error is None else str(given.error)
        )
        for one, (_, text), given in zip(completions, answered, grading.grades(answered, ranks), strict=True)
    ]  # fmt: skip


def all_rows(tasks: Sequence[Task], answers: Sequence[Answer], samples: int) -> AnswerRows:
    """All answers. Those of a task share its prompt; many long ones make several rows."""
    members = list[tuple[int, list[int]]]()
    for number, task in enumerate(tasks):
        tokens = TREE_TOKENS
        for k in range(number * samples, (number + 1) * samples):
            if tokens + len(answers[k].ids) > TREE_TOKENS:
                members.append((number, []))
                tokens = len(task.prompt.ids)
            members[-1][1].append(k)
            tokens += len(answers[k].ids)
    return AnswerRows.of(tasks, answers, members)


def token_scores(
    launcher: Launcher,
    answers: AnswerRows,
    lengths: Sequence[int],
    between: Callable[[], None],
    *,
    values: bool = True,
) -> dict[str, TokenValues]:
    """`logps`, log π of each token of all answers under the current weights, by the kernels that train.

    With a value head also its `values`, unless nobody wants them. `between` is called after each launch.
    """
    policy, parts = launcher.policy, dict[str, dict[int, Tensor]]()
    wanted = values and policy.value_head is not None

    def score(pack: Pack) -> Values:
        tokens = policy.score(pack, values=wanted).tokens
        return {"logps": tokens.logps} | ({} if tokens.values is None else {"values": tokens.values})

    segments = launcher.plan(answers.segments(policy)).segments
    for group, scored in launcher.forward(segments, score):
        numbers = answers.of_segments(group)
        for name, flat in scored.items():
            pieces = torch.split(flat, [lengths[number] for number in numbers])
            parts.setdefault(name, {}).update(zip(numbers, pieces, strict=True))
        between()
    return {
        name: TokenValues(torch.cat([pieces[number] for number in range(len(lengths))]), lengths)
        for name, pieces in parts.items()
    }


def check(policy: Policy, tasks: Sequence[Task], max_tokens: int, launcher: Launcher) -> None:
    """Let `policy` copy its prompts if the cache of shared ones is not exact, judged by some of `tasks`."""
    with policy.plain_layers():
        decoding.check(policy, [task.prompt.ids for task in tasks], max_tokens, launcher.events, launcher.ranks)
