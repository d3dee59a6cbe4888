"""What a run will do: its stages, their rows, and which rows each optimizer step takes."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch

from app.datasets.check import Report, examples
from app.datasets.example import Example
from app.jobs.spec import DEFAULT_VALIDATION_SPLIT, DPOHyperparameters, JobSpec, SupervisedHyperparameters
from worker.trainer.data import Row, Tokenizer, Truncation, rows
from worker.trainer.events import Events, UserError

DEFAULT_MAX_LENGTH = 2048
DEFAULT_INTERVALS = 5


@dataclass(frozen=True)
class Stage:
    """A stage: `sft` or `dpo`, the rows it trains on and is validated on, and its settings."""

    name: str
    hyperparameters: SupervisedHyperparameters | DPOHyperparameters
    train: list[Row]
    validation: list[Row]
    seed: int

    @property
    def batch_size(self) -> int:
        return min(self.hyperparameters.batch_size or 16, len(self.train))

    @property
    def steps(self) -> int:
        """Optimizer steps. Batches run on over the ends of epochs, so that each has exactly `batch_size` rows."""
        if self.hyperparameters.max_steps is not None:
            return self.hyperparameters.max_steps
        return math.ceil(len(self.train) * (self.hyperparameters.n_epochs or 1) / self.batch_size)

    @property
    def eval_every(self) -> int:
        return self.hyperparameters.eval_every or math.ceil(self.steps / DEFAULT_INTERVALS)

    @property
    def checkpoint_every(self) -> int:
        return self.hyperparameters.checkpoint_every or math.ceil(self.steps / DEFAULT_INTERVALS)

    def batch(self, step: int) -> list[int]:
        """Numbers of the rows of optimizer step `step` (from 0): a function of seed and step alone."""
        size, first = len(self.train), step * self.batch_size
        order = partial(_order, size, self.seed)
        return [order(i // size)[i % size] for i in range(first, first + self.batch_size)]

    def learning_rate(self, step: int) -> float:
        """The rate of optimizer step `step`: linear warm-up, then cosine, linear or constant."""
        h = self.hyperparameters
        peak = (h.learning_rate or 0.0) * (h.learning_rate_multiplier or 1.0)
        warmup = math.ceil(h.warmup_ratio * self.steps)
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, self.steps - warmup)
        if h.lr_scheduler == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * done))
        return peak * (1 - done) if h.lr_scheduler == "linear" else peak


@lru_cache(maxsize=2)  # a batch touches one epoch, or the ends of two
def _order(size: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator).tolist()


def stages(spec: JobSpec, folder: Path, tokenizer: Tokenizer, context: int, events: Events) -> list[Stage]:
    """The stages of `spec`, whose files are paths relative to `folder`. `context` is the model's, in tokens."""
    load = _Loader(folder, tokenizer, context, events)
    seed, split = spec.seed or 0, spec.validation_split or 0.0
    if spec.method.type == "supervised":
        assert spec.method.supervised is not None
        settings = spec.method.supervised.hyperparameters
        train, validation = load.both(spec.training_file, spec.validation_file, split, seed, settings, "training_file")
        return [Stage("sft", settings, train, validation, seed)]
    assert spec.method.dpo is not None
    dpo = spec.method.dpo.hyperparameters
    train, validation = load.both(spec.training_file, spec.validation_file, split, seed, dpo, "training_file")
    if any(len(row.responses) != 2 for row in train + validation):
        raise UserError(
            "invalid_training_file", "DPO needs a preferred and a rejected answer in every row.", "training_file"
        )
    result = [Stage("dpo", dpo, train, validation, seed)]
    if spec.sft is not None:
        settings = spec.sft.hyperparameters
        if spec.sft.training_file is not None:
            own = split if spec.validation_file is None else DEFAULT_VALIDATION_SPLIT
            sft_split = 0.0 if spec.sft.validation_file else own
            train, validation = load.both(
                spec.sft.training_file,
                spec.sft.validation_file,
                sft_split,
                seed,
                settings,
                "sft.training_file",
            )
        else:
            train, validation = load.both(
                spec.training_file, spec.validation_file, split, seed, settings, "training_file"
            )
        result.insert(0, Stage("sft", settings, train, validation, seed))
    return result


@dataclass
class _Loader:
    folder: Path
    tokenizer: Tokenizer
    context: int
    events: Events

    def both(
        self,
        training: str,
        validation: str | None,
        split: float,
        seed: int,
        settings: SupervisedHyperparameters | DPOHyperparameters,
        param: str,
    ) -> tuple[list[Row], list[Row]]:
        """The rows to train on and to validate on."""
        train = self._rows(training, settings, param)
        if validation is not None:
            return train, self._rows(validation, settings, param.replace("training", "validation"))
        # By line, so that the stages of a job hold out the same examples, and a text's pieces stay together.
        lines = sorted({row.line for row in train}, key=lambda line: random.Random(f"{seed} {line}").random())  # noqa: S311
        chosen = set(lines[: min(round(split * len(lines)), len(lines) - 1)])
        return [row for row in train if row.line not in chosen], [row for row in train if row.line in chosen]

    def _rows(self, name: str, settings: SupervisedHyperparameters | DPOHyperparameters, param: str) -> list[Row]:
        max_length = min(settings.max_length or DEFAULT_MAX_LENGTH, self.context)
        cut = Truncation()
        supervised = isinstance(settings, SupervisedHyperparameters)
        loss_on = settings.loss_on if isinstance(settings, SupervisedHyperparameters) else "answers"
        kept = list(self._learnable(name, max_length, loss_on, cut, supervised=supervised))
        if not kept:
            raise UserError("no_training_rows", f"No row of '{name}' has a token to learn.", param)
        if cut.prompts or cut.answers or cut.lost:
            self.events.message(
                f"Cut to max_length {max_length}: {cut.prompts} prompts (from the left), {cut.answers} rows with "
                f"an answer cut short, {cut.lost} left out because no token to learn was left.",
                level="warn",
            )
        return kept

    def _learnable(
        self, name: str, max_length: int, loss_on: str, cut: Truncation, *, supervised: bool
    ) -> Iterator[Row]:
        with (self.folder / name).open("rb") as file:
            found: Iterator[Example] = examples(file, Report())
            if supervised:  # of a pair, SFT learns the preferred answer
                found = (replace(example, responses=example.responses[:1]) for example in found)
            made = rows(found, self.tokenizer, max_length=max_length, loss_on=loss_on, cut=cut)
            for row in made:
                if row.learnable:
                    yield row
                else:
                    cut.lost += 1
