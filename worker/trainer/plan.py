"""What a run will do: its stages, their rows, and which rows each optimizer step takes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path

import numpy
import torch

from app.spec.datasets.rendering import Rendering
from app.spec.hyperparameters import DEFAULT_MAX_LENGTH, DPOHyperparameters, SupervisedHyperparameters
from app.spec.job import JobSpec, StageSpec
from worker.trainer.cache import Cache
from worker.trainer.data import Recipe, Tally, Tokenizer
from worker.trainer.dataset import Integers, Rows, load
from worker.trainer.errors import UserError
from worker.trainer.events import Events
from worker.trainer.methods import METHODS
from worker.trainer.rendering import Renderer

DEFAULT_INTERVALS = 5


@dataclass(frozen=True)
class Stage:
    """A stage: `sft` or `dpo`, the rows it trains on and is validated on, and its settings."""

    name: str
    hyperparameters: SupervisedHyperparameters | DPOHyperparameters
    train: Rows
    validation: Rows
    seed: int
    param: str = ""
    """Where its hyperparameters are in the job spec."""
    told: tuple[str, ...] = ()
    """What became of the rows of its training file, in words."""
    repeated: int = 0
    """Validation rows that ask what training rows ask too."""

    @cached_property
    def longest(self) -> int:
        """The tokens of the largest row, of those for validation too."""
        return max(self.train.longest, self.validation.longest)

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
        places = range(first, first + self.batch_size)
        return [_order(self._groups, self.seed, place // size)[place % size] for place in places]

    @cached_property
    def _groups(self) -> "Groups":
        groups = METHODS[self.name].groups(self.train, self.batch_size)
        return Groups(tuple(map(tuple, groups)))

    def learning_rate(self, step: int) -> float:
        """The rate of optimizer step `step`: linear warm-up, then cosine, linear or constant."""
        h = self.hyperparameters
        peak = (h.learning_rate or 0.0) * (h.learning_rate_multiplier or 1.0)
        warmup = (
            min(math.ceil(h.warmup_ratio * self.steps), self.steps - 1) if h.warmup_steps is None else h.warmup_steps
        )
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, self.steps - warmup)
        if h.lr_scheduler == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * done))
        return peak * (1 - done) if h.lr_scheduler == "linear" else peak


@dataclass(frozen=True, eq=False)
class Groups:
    """Numbers of rows, in groups that are shuffled as one."""

    rows: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=2)  # a batch touches one epoch, or the ends of two
def _order(groups: Groups, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(groups.rows), generator=generator).tolist()
    return [number for group in order for number in groups.rows[group]]


def stages(
    spec: JobSpec, folder: Path, tokenizer: Tokenizer, context: int, cache: Cache, events: Events
) -> list[Stage]:
    """The stages of `spec`, whose files are paths relative to `folder`. `context` is the model's, in tokens."""
    loader = _Loader(folder, tokenizer, context, cache, events, spec.seed or 0, spec.rendering)
    if Renderer(tokenizer, spec.rendering).never_ends:
        events.message(NEVER_ENDS, level="warn", data={"code": "template_never_ends"})
    # The method's rows first: a stage before it that has the same file holds out the same prompts.
    return [loader.stage(stage) for stage in reversed(spec.stages())][::-1]


@dataclass
class _Loader:
    """Reads files into stages."""

    folder: Path
    tokenizer: Tokenizer
    context: int
    cache: Cache
    events: Events
    seed: int
    rendering: Rendering
    held_out: dict[tuple[str, ...], Integers] = field(default_factory=dict)
    """By files, what the rows ask that are validated on."""

    def stage(self, asked: StageSpec) -> Stage:
        """The stage on its training files, validated on its validation file or on a share of the examples."""
        settings, param = asked.settings, asked.file_field
        most = min(settings.max_length or DEFAULT_MAX_LENGTH, self.context)
        recipe = Recipe(settings.data, most, settings.scored, asked.mapping, self.rendering, settings.truncation)
        train, words = self._rows(asked.training, recipe, param)
        if asked.validation is not None:
            held_out, _ = self._rows((asked.validation,), recipe, param.replace("training", "validation"))
        else:
            train, held_out = self._split(train, asked)
        repeated = self._warn_of_repeated(train, held_out)
        arranged = METHODS[asked.name].arranged
        train, held_out = (arranged(rows, settings, recipe.max_length) for rows in (train, held_out))
        return Stage(asked.name, settings, train, held_out, self.seed, asked.field, words, repeated)

    def _split(self, rows: Rows, asked: StageSpec) -> tuple[Rows, Rows]:
        """(rows to train on, rows that are held out)."""
        share = asked.validation_split
        if asked.training not in self.held_out:
            self.held_out[asked.training] = held_out_groups(rows, share, self.seed)
        inside = numpy.isin(rows.groups, self.held_out[asked.training])
        train, held_out = rows.where(~inside), rows.where(inside)
        if share > 0 and not len(held_out) and len(train) > 1:
            message = "No row is held out for validation: too many of them ask the same. Give a 'validation_file'."
            self.events.message(message, level="warn")
        return train, held_out

    def _warn_of_repeated(self, train: Rows, held_out: Rows) -> int:
        """How many validation rows ask what training rows ask too; they are warned of."""
        repeated = int(numpy.isin(held_out.groups, train.groups).sum())
        if repeated:
            self.events.message(
                f"{repeated} of {len(held_out)} validation rows ask what training rows ask too: what is measured on "
                "them is in part what was learned by heart.",
                level="warn",
                data={"code": "validation_prompts_in_training", "rows": repeated, "validation_rows": len(held_out)},
            )
        return repeated

    def _rows(self, names: tuple[str, ...], recipe: Recipe, param: str) -> tuple[Rows, tuple[str, ...]]:
        parts, tally = [], Tally()
        for name in names:
            rows, lost = load(self.folder / name, self.tokenizer, recipe, self.cache)
            parts.append(rows)
            tally.add(lost)
        found = Rows.together(parts)
        if not len(found):
            refused = next(iter(tally.details.values()), None)
            if refused is not None:
                raise UserError("chat_template_error", f"No row can be trained on. {refused}", param)
            raise UserError("no_training_rows", f"No row of '{', '.join(names)}' has a token to learn.", param)
        words = tuple(told(tally, recipe, len(found)))
        for message in words:
            self.events.message(message, level="warn")
        return found, words


NEVER_ENDS = (
    "The model's chat template writes nothing at the end of an answer by which the model could learn to stop; "
    "'append_eos': true puts the end-of-sequence token there."
)


def told(tally: Tally, recipe: Recipe, rows: int) -> Iterator[str]:
    """What a user must know of what became of a file's rows, of which `rows` are trained on."""
    if tally.prompts or tally.answers or tally.lost or tally.long:
        side = {"keep_end": "from the left", "keep_start": "from the right", "drop": ""}[recipe.truncation]
        left = f", {tally.long} left out because they are longer" if tally.long else ""
        yield (
            f"Cut to max_length {recipe.max_length}: {tally.prompts} prompts ({side}), {tally.answers} rows with an "
            f"answer cut short{left}, {tally.lost} left out because no token to learn was left."
        )
    for reason, count in sorted(tally.refused.items()):
        yield f"{count} rows are left out ({reason}). {tally.details[reason]}"
    if tally.templated:
        yield (
            f"{tally.templated} of {rows} prompts were written by a chat template already and are taken as they are; "
            "'chat_template': true would wrap them all the same."
        )
    if tally.control_text:
        yield f"{tally.control_text} rows hold text that looks like a control token; it is text, and trained as such."


def held_out_groups(rows: Rows, share: float, seed: int) -> Integers:
    """What the rows ask that are held out for validation, drawn by the seed: about `share` of the lines together.

    So no prompt is on both sides, and a text's pieces stay together. No group is taken that is much more than what is
    wanted: then there may be none.
    """
    lines, groups = numpy.array(rows.lines) + (numpy.array(rows.files) << 40), rows.groups
    pairs = numpy.unique(numpy.stack([groups, lines]), axis=1)
    names, sizes = numpy.unique(pairs[0], return_counts=True)
    wanted = min(round(share * pairs.shape[1]), pairs.shape[1] - 1)
    order = sorted(range(len(names)), key=lambda k: sha256(f"{seed} {names[k]}".encode()).digest())
    chosen, taken = [], 0
    for k in order:
        if taken + sizes[k] <= wanted:
            chosen.append(names[k])
            taken += sizes[k]
    if not chosen and wanted and len(names) > 1:
        smallest = min(order, key=lambda k: sizes[k])
        if 2 * sizes[smallest] <= pairs.shape[1]:
            chosen.append(names[smallest])
    return numpy.array(chosen, dtype=numpy.int64)
