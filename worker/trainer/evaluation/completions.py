"""Completions of a side's model: what earlier attempts left is kept, and only the rest is sampled.

Completions are handed over as they come, in parts: an attempt that is broken off goes on behind them.
"""

import gc
import json
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from app.spec.datasets.example import Example, Kind
from app.spec.evaluation import SamplingSpec, Side
from worker.trainer import data
from worker.trainer.data import Recipe
from worker.trainer.errors import Stopped, UserError
from worker.trainer.evaluation.run import JUDGE, EvaluationRun
from worker.trainer.events import CompletionsWritten
from worker.trainer.model import Policy
from worker.trainer.rendering import Renderer
from worker.trainer.sampling import Completion, CompletionRequest, Sampling, batches, sample

PART_SECONDS = 5.0
"""A part is written after at least so long."""
MAX_COMPLETIONS = 1_000_000
BATCH_TOKENS = {"cpu": 16_384, "cuda": 131_072}
"""Tokens of the prompts and answers that are sampled at once, by device."""
BATCH_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Logits of one sampling step, by device."""
BASELINE_SEEDS = 1 << 31
"""The baseline draws with seeds from here on. Seeds of users are below.

Two sides with the same random numbers would be alike in more than their models are. The win rate of independent
answers is a different one.
"""
CompletionKey = tuple[float, int, int]
"""The temperature of a completion, its row, and its number among those of the row."""


class Prompt(NamedTuple):
    """The tokens that a model answers, and the end of the prompt's text that its first token will contain."""

    ids: tuple[int, ...]
    rest: str


@dataclass(frozen=True)
class CompletionStore:
    """The completions of one side in `parts/`, a line each. A part's name says its side, number and attempt."""

    run: EvaluationRun
    side: str
    total: int
    """The completions that the whole evaluation needs."""

    def read(self) -> Iterator[Completion]:
        """All completions that are kept."""
        for path in sorted(self._folder.glob(f"{self.side}-*.jsonl")):
            for line in path.read_text().splitlines():
                fields = json.loads(line)
                yield Completion(**fields | {"ids": tuple(fields["ids"])})

    def write(self, completions: list[Completion]) -> None:
        """Hand completions over, so that no later attempt samples them again."""
        if not completions:
            return
        self._folder.mkdir(exist_ok=True)
        number = len(list(self._folder.iterdir()))
        path = self._folder / f"{self.side}-{number:05d}-{self.run.about['attempt']}.jsonl"
        path.write_text("".join(json.dumps(vars(completion)) + "\n" for completion in completions))
        self.run.events.emit(CompletionsWritten(f"parts/{path.name}", len(completions), self.total))

    @property
    def _folder(self) -> Path:
        return self.run.folder / "parts"


def complete(
    run: EvaluationRun, policy: Policy, side: str, prompts: dict[int, Prompt], spec: SamplingSpec
) -> Iterator[Completion]:
    """All completions of a side's model to `prompts`, by row. Raises `Stopped`, with what was sampled kept."""
    total = _completions_of_a_prompt(run, side, spec) * len(prompts)
    if total > MAX_COMPLETIONS:
        message = f"{total} completions are more than {MAX_COMPLETIONS}: give 'max_rows', or fewer samples."
        raise UserError("invalid_value", message, "sampling.samples")
    store = CompletionStore(run, side, total)
    known = {completion.key: completion for completion in store.read()}
    run.events.message(f"{side}: {len(known)} completions are there already.")
    seed = (run.spec.seed or 0) + (BASELINE_SEEDS if side == "baseline" else 0)
    ends, device = _end_tokens(run, policy, side), policy.device.type
    vocabulary: int = policy.causal.config.get_text_config().vocab_size
    largest = 1 if policy.one_by_one else max(1, BATCH_LOGITS[device] // vocabulary)
    fresh, written_at = list[Completion](), time.monotonic() - PART_SECONDS
    for temperature in spec.temperatures:
        sampling = Sampling(temperature, spec.top_p, spec.max_tokens, seed)
        numbers = range(samples_of(run, side) if temperature else 1)
        requests = [CompletionRequest(row, n, prompt.ids) for row, prompt in prompts.items() for n in numbers]
        # Whole batches, the same ones each time: an attempt that goes on comes to the same bits.
        for batch in batches(requests, BATCH_TOKENS[device], spec.max_tokens, largest):
            keys = [(temperature, request.row, request.sample) for request in batch]
            if not all(key in known for key in keys):
                try:
                    sampled = _sample(run, policy, batch, sampling, ends)
                except Stopped:
                    store.write(fresh)
                    raise
                fresh += sampled
                known |= {completion.key: completion for completion in sampled}
                if time.monotonic() - written_at > PART_SECONDS:
                    store.write(fresh)
                    fresh, written_at = [], time.monotonic()
            yield from (known[key] for key in keys)
    store.write(fresh)


def samples_of(run: EvaluationRun, name: str) -> int:
    """How many completions of each prompt a side's model samples."""
    if name == JUDGE:
        return 1
    side: Side = getattr(run.spec, name)
    samples = run.spec.sampling.samples if run.spec.sampling is not None else 1
    return samples * (side.best_of.n if side.best_of is not None else 1)


def prompts_of(run: EvaluationRun, policy: Policy, side: str, rows: dict[int, Example]) -> dict[int, Prompt]:
    """The prompts as a side's model was trained on them, cut so that an answer has room."""
    assert run.spec.sampling is not None
    room = run.max_length(policy) - run.spec.sampling.max_tokens
    if room < 1:
        message = f"'max_tokens' leaves no room for a prompt in the model's {run.max_length(policy)} tokens."
        raise UserError("invalid_value", message, "sampling.max_tokens")
    renderer = Renderer(policy.tokenizer, run.rendering(side))
    recipe = Recipe(Kind.RANKED, room)
    return {row: Prompt(*data.prompt_ids(example, renderer, recipe)) for row, example in rows.items()}


def text_of(policy: Policy, completion: Completion, prompt: Prompt, example: Example) -> str:
    """The answer as data has it: without the end of the prompt's text that its first token contains."""
    ids = completion.ids[:-1] if completion.ended else completion.ids
    text: str = policy.tokenizer.decode(ids, skip_special_tokens=True).removeprefix(prompt.rest)
    plain_text = policy.tokenizer.chat_template is None and isinstance(example.prompt, str)
    return text if plain_text else text.strip()


def _completions_of_a_prompt(run: EvaluationRun, side: str, spec: SamplingSpec) -> int:
    """Completions of one prompt by all models that sample at the same stage of the evaluation."""
    sides = [side]
    if side != JUDGE and run.spec.type == "win_rate":
        sides = [name for name in ("candidate", "baseline") if getattr(run.spec, name).model is not None]
    return sum(samples_of(run, name) if temperature else 1 for temperature in spec.temperatures for name in sides)


def _end_tokens(run: EvaluationRun, policy: Policy, side: str) -> set[int]:
    """The tokens that end an answer: those of the template, and those of the model's own configuration."""
    configured = policy.causal.generation_config.eos_token_id
    ends = {*Renderer(policy.tokenizer, run.rendering(side)).ends}
    return ends | ({*(configured if isinstance(configured, list) else [configured])} - {None})


def _sample(
    run: EvaluationRun, policy: Policy, batch: list[CompletionRequest], sampling: Sampling, ends: Collection[int]
) -> list[Completion]:
    """The completions of a batch; where it does not fit into memory, those of its halves."""
    try:
        return list(sample(policy, batch, sampling, ends, run.tick))
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    gc.collect()
    torch.cuda.empty_cache()
    half = len(batch) // 2
    return [
        completion for part in (batch[:half], batch[half:]) for completion in _sample(run, policy, part, sampling, ends)
    ]
