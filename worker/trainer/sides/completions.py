"""Completions of a side's model. Those of earlier attempts are reused, and only the rest is sampled.

Completions are written in parts while they are sampled. The next attempt continues after the last part.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.spec.datasets.example import Example, Kind
from app.spec.evaluation import SamplingSpec
from worker.trainer import data, decoding
from worker.trainer.data import Recipe
from worker.trainer.errors import Stopped, UserError
from worker.trainer.events import CompletionsWritten
from worker.trainer.hardware import hardware
from worker.trainer.model import Policy
from worker.trainer.rendering import Renderer
from worker.trainer.sampling import (
    Completion,
    CompletionRequest,
    Prompt,
    Sampling,
    batches,
    end_tokens,
    sample_together,
)
from worker.trainer.sides.run import SidesRun

PART_SECONDS = 5.0
"""Minimum time between two parts."""
MAX_COMPLETIONS = 1_000_000
SEEDS = 1 << 31
"""User seeds are smaller. Each side adds a multiple of it to the seed, so that no two sides share random numbers.

With the same random numbers, similar models would give correlated answers.
"""
CompletionKey = tuple[float, int, int]
"""(temperature, row, number of the completion among those of the row)."""


@dataclass(frozen=True)
class CompletionStore:
    """The completions of one side in `parts/`, one per line. A part is named by its side, number and attempt."""

    run: SidesRun
    side: str
    total: int
    """Number of completions that the whole job needs."""

    def read(self) -> Iterator[Completion]:
        """All completions in the folder."""
        for path in sorted(self._folder.glob(f"{self.side}-*.jsonl")):
            for line in path.read_text().splitlines():
                fields = json.loads(line)
                yield Completion(**fields | {"ids": tuple(fields["ids"])})

    def write(self, completions: list[Completion]) -> None:
        """Write completions to a new part and announce it. Later attempts do not sample them again.

        The first rank writes them.
        """
        if not completions or not self.run.ranks.is_first:
            return
        self._folder.mkdir(exist_ok=True)
        number = len(list(self._folder.iterdir()))
        path = self._folder / f"{self.side}-{number:05d}-{self.run.about['attempt']}.jsonl"
        path.write_text("".join(json.dumps(vars(completion)) + "\n" for completion in completions))
        self.run.events.emit(CompletionsWritten(f"parts/{path.name}", len(completions), self.total))

    @property
    def _folder(self) -> Path:
        return self.run.folder / "parts"


@dataclass(frozen=True)
class Assignment:
    """The completions that the model of a side is to write for each prompt."""

    sampling: SamplingSpec
    samples: int
    """Number of completions at each temperature above 0. Greedy decoding has one answer."""
    stream: int = 0
    """Number of the stream of random numbers. No two sides have the same."""
    of_all: int | None = None
    """Number of completions of a prompt by all sides together. None: this one is alone."""
    parts: str | None = None
    """The beginning of the names of its parts. None: the side's name."""

    @property
    def each(self) -> int:
        """Number of completions of a prompt."""
        return sum(self.samples if temperature else 1 for temperature in self.sampling.temperatures)


def complete(
    run: SidesRun, policy: Policy, side: str, prompts: dict[int, Prompt], assignment: Assignment
) -> Iterator[Completion]:
    """All completions of the model of `side`. `prompts` maps rows to prompts.

    Raises `Stopped` after writing what was sampled, and `UserError` if there are too many completions.
    """
    spec, total = assignment.sampling, (assignment.of_all or assignment.each) * len(prompts)
    if total > MAX_COMPLETIONS:
        message = f"{total} completions exceed the limit of {MAX_COMPLETIONS}. Set 'max_rows', or fewer 'samples'."
        raise UserError("invalid_value", message, "sampling.samples")
    store = CompletionStore(run, assignment.parts or side, total)
    completions = {completion.key: completion for completion in store.read()}
    run.events.message(f"{side}: {len(completions)} completions of earlier attempts are reused.")
    seed = (run.spec.seed or 0) + SEEDS * assignment.stream
    ends = end_tokens(policy, Renderer(policy.tokenizer, run.rendering(side)).ends)
    chosen = hardware(policy.device)
    vocabulary: int = policy.causal.config.get_text_config().vocab_size
    largest_batch = 1 if policy.one_by_one else max(1, chosen.sampled_logits // vocabulary)
    if prompts:
        decoding.check(policy, [prompt.ids for prompt in prompts.values()], spec.max_tokens, run.events, run.ranks)
    unwritten, written_at = list[Completion](), time.monotonic() - PART_SECONDS
    for temperature in spec.temperatures:
        sampling = Sampling(temperature, spec.top_p, spec.max_tokens, seed)
        numbers = range(assignment.samples if temperature else 1)  # greedy decoding has one answer
        requests = [CompletionRequest(row, k, prompt.ids) for row, prompt in prompts.items() for k in numbers]
        # Every attempt forms the same batches and samples whole batches, on whatever rank. Its results are therefore
        # bit-identical.
        formed = batches(requests, chosen.sampled_tokens, spec.max_tokens, largest_batch)
        missing = [
            batch
            for batch in formed
            if not all((temperature, request.row, request.sample) in completions for request in batch)
        ]
        for together in data.batched(missing, run.ranks.size):
            sampled = sample_together(policy, together, sampling, ends, run.ranks, run.check_own_stop)
            unwritten += sampled.completions
            completions |= {completion.key: completion for completion in sampled.completions}
            if sampled.stopped or time.monotonic() - written_at > PART_SECONDS:
                store.write(unwritten)
                unwritten, written_at = [], time.monotonic()
            if sampled.stopped:
                raise Stopped
        for batch in formed:
            yield from (completions[temperature, request.row, request.sample] for request in batch)
    store.write(unwritten)


def prompts_of(
    run: SidesRun, policy: Policy, side: str, rows: dict[int, Example], max_tokens: int
) -> dict[int, Prompt]:
    """The prompts, rendered as in the training of the side's model, and cut to leave room for `max_tokens`.

    Raises `UserError` if `max_tokens` leaves no room for a prompt.
    """
    room = run.max_length(policy) - max_tokens
    if room < 1:
        message = f"'max_tokens' leaves no room for a prompt in the model's {run.max_length(policy)} tokens."
        raise UserError("invalid_value", message, "sampling.max_tokens")
    renderer = Renderer(policy.tokenizer, run.rendering(side))
    recipe = Recipe(Kind.RANKED, room)
    return {row: Prompt(*data.prompt_ids(example, renderer, recipe)) for row, example in rows.items()}
