"""The plan of a run: its stages, their rows, the rows of each optimizer step, and the learning rates."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path

import numpy
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from app.spec.datasets.example import Kind
from app.spec.datasets.rendering import Rendering
from app.spec.hyperparameters import DEFAULT_MAX_LENGTH, Hyperparameters, ReinforcementHyperparameters
from app.spec.job import JobSpec, StageSpec
from app.spec.json_types import JsonObject
from worker.trainer.arrays import Integers, Shelf
from worker.trainer.cache import Cache
from worker.trainer.data import Recipe, Tally
from worker.trainer.dataset import Groups, Rows, load
from worker.trainer.errors import UserError
from worker.trainer.events import Events
from worker.trainer.grading import Exercise, Grading
from worker.trainer.methods import METHODS
from worker.trainer.packing import TREE_TOKENS
from worker.trainer.rendering import Renderer
from worker.trainer.tasks import Tasks

DEFAULT_INTERVALS = 5
"""By default a stage validates and writes a checkpoint this many times."""


@dataclass(frozen=True)
class Stage:
    """A stage, such as `sft`: its settings, its training rows and its validation rows."""

    name: str
    hyperparameters: Hyperparameters
    train: Rows
    validation: Rows
    seed: int
    param: str = ""
    """The field of the job spec that holds its hyperparameters. Error messages name it."""
    notes: tuple[str, ...] = ()
    """Sentences about rows of its training files that were cut or left out."""
    repeated: int = 0
    """Number of validation rows whose prompt is also in the training rows."""
    shelf: Shelf = field(default_factory=Shelf)
    """Where the order of its rows is kept."""
    exercise: Exercise | None = None
    """The prompts of a reinforcement stage, and their grading."""

    @property
    def batch_size(self) -> int:
        """Rows per optimizer step. A stage with fewer rows takes all of them."""
        return min(self.hyperparameters.batch_size or 16, len(self.train))

    @property
    def written_tokens(self) -> int:
        """The most tokens of the answers that a reinforcement stage writes to a prompt; 0 for other stages."""
        settings = self.hyperparameters
        return settings.answers * settings.max_tokens if isinstance(settings, ReinforcementHyperparameters) else 0

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its responses that are computed together, which no pack can split."""
        settings, written = self.hyperparameters, 0
        if isinstance(settings, ReinforcementHyperparameters):
            written = max(settings.max_tokens, min(self.written_tokens, TREE_TOKENS))
        return self.train.longest + written

    @property
    def steps(self) -> int:
        """Number of optimizer steps. A batch may span two epochs: each has exactly `batch_size` rows."""
        if self.hyperparameters.max_steps is not None:
            return self.hyperparameters.max_steps
        batches = math.ceil(len(self.train) * (self.hyperparameters.n_epochs or 1) / self.batch_size)
        return batches * self.hyperparameters.repeats

    @property
    def eval_every(self) -> int:
        """Optimizer steps between two validations."""
        return self.hyperparameters.eval_every or math.ceil(self.steps / DEFAULT_INTERVALS)

    @property
    def checkpoint_every(self) -> int:
        """Optimizer steps between two checkpoints."""
        return self.hyperparameters.checkpoint_every or math.ceil(self.steps / DEFAULT_INTERVALS)

    def batch(self, step: int) -> list[int]:
        """Numbers of the rows of optimizer step `step`, counted from 0. They depend on the seed and the step alone."""
        size, first = len(self.train), step // self.hyperparameters.repeats * self.batch_size
        # Positions in the concatenation of all epochs: epoch · size + position within the epoch.
        positions = range(first, first + self.batch_size)
        return [int(self._order(position // size)[position % size]) for position in positions]

    @cached_property
    def groups(self) -> Groups:
        """The groups of training rows that stay together."""
        made = cache(lambda: METHODS[self.name].groups(self.train, self.batch_size))  # unless another rank has
        return Groups(self.shelf.keep("grouped", lambda: made().rows), self.shelf.keep("starts", lambda: made().starts))

    def prepare(self) -> None:
        """Compute what each step needs of all rows, so that the other ranks find it."""
        for rows in (self.train, self.validation):
            rows.prepare()
        if len(self.train):
            self._order(0)

    def _order(self, epoch: int) -> Integers:
        """The row numbers in the order of `epoch`, [rows]: a permutation of the groups."""
        if epoch not in self._orders:

            def shuffled() -> Integers:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(len(self.groups.starts) - 1, generator=generator)
                return self.groups.ordered(order.numpy())

            self._orders.pop(epoch - 2, None)  # a batch usually touches one epoch or two
            self.shelf.drop(f"order-{epoch - 2}")
            self._orders[epoch] = self.shelf.keep(f"order-{epoch}", shuffled)
        return self._orders[epoch]

    @cached_property
    def _orders(self) -> dict[int, Integers]:
        return {}

    def learning_rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0.

        It rises linearly during the warmup. Then it is constant, or falls to 0 linearly or as half a cosine wave.
        """
        settings = self.hyperparameters
        peak = (settings.learning_rate or 0.0) * (settings.learning_rate_multiplier or 1.0)
        warmup = settings.warmup_steps  # in steps
        if warmup is None:
            warmup = min(math.ceil(settings.warmup_ratio * self.steps), self.steps - 1)
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, self.steps - warmup)  # 0 at the peak, below 1 at the last step
        if settings.lr_scheduler == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        return peak * (1 - progress) if settings.lr_scheduler == "linear" else peak


def stages(
    spec: JobSpec,
    folder: Path,
    tokenizer: Tokenizer,
    context: int,
    cache: Cache,
    events: Events,
    renderings: Sequence[JsonObject] = (),
) -> list[Stage]:
    """Load the stages of `spec`. Its files are paths relative to `folder`. `context`: the model's context, in tokens.

    `renderings`: how the reward models of its grader render conversations.

    Raises `UserError` for a file without a row to train on.
    """
    grading = None
    if spec.method.reinforcement is not None:
        own = [Rendering(**rendering) for rendering in renderings] or [Rendering()] * len(spec.grader_models)
        models = [(folder / "graders" / str(number) / "base", rendering) for number, rendering in enumerate(own)]
        grading = Grading(spec.method.reinforcement.grader, folder, models)
    loader = _Loader(folder, tokenizer, context, cache, events, spec.seed or 0, spec.rendering, grading)
    if Renderer(tokenizer, spec.rendering).never_ends:
        events.message(NEVER_ENDS, level="warn", data={"code": "template_never_ends"})
    # The last stage is loaded first. An SFT stage on the same files then holds out the same prompts.
    return [loader.stage(stage) for stage in reversed(spec.stages())][::-1]


@dataclass
class _Loader:
    """Loads the files of stages."""

    folder: Path
    tokenizer: Tokenizer
    context: int
    cache: Cache
    events: Events
    seed: int
    rendering: Rendering
    grading: Grading | None = None
    held_out: dict[tuple[str, ...], Integers] = field(default_factory=dict)
    """Maps the training files of a stage to the groups (prompts) that are held out for validation."""

    def stage(self, spec: StageSpec) -> Stage:
        """The stage with its rows. Without a validation file, a share of its training rows is held out."""
        settings, param, shelf = spec.settings, spec.file_field, Shelf(self.folder / "rows").of(spec.name)
        max_length = min(settings.max_length or DEFAULT_MAX_LENGTH, self.context)
        if isinstance(settings, ReinforcementHyperparameters):
            max_length = self._prompt_room(settings, max_length, spec.field)
        recipe = Recipe(
            settings.data, max_length, settings.scored, spec.mapping, self.rendering, settings.truncation,
            settings.pair_rule,
        )  # fmt: skip
        train, notes = self._rows(spec.training, recipe, param, shelf.of("all"))
        if spec.validation is not None:
            held_out, _ = self._rows((spec.validation,), recipe, param.replace("training", "validation"), shelf)
        else:
            train, held_out = self._split(train, spec, shelf)
        repeated = self._warn_of_repeated(train, held_out)
        prepare = METHODS[spec.name].prepare_rows
        train, held_out = (
            prepare(rows, settings, recipe.max_length, shelf.of(part)).on(shelf.of(part))
            for part, rows in (("train", train), ("validation", held_out))
        )
        exercise = None if self.grading is None or settings.data != Kind.PROMPTS else self._exercise(spec, recipe)
        return Stage(spec.name, settings, train, held_out, self.seed, spec.field, notes, repeated, shelf, exercise)

    @staticmethod
    def _prompt_room(settings: ReinforcementHyperparameters, max_length: int, field: str) -> int:
        """The most tokens of a prompt, and one that stands for an answer. Raises `UserError` if no prompt has room."""
        room = max_length - settings.max_tokens
        if room < 1:
            message = f"'max_tokens' leaves no room for a prompt in {max_length} tokens."
            raise UserError("invalid_value", message, f"{field}.max_tokens")
        return room + 1

    def _exercise(self, spec: StageSpec, recipe: Recipe) -> Exercise:
        """The prompts of a reinforcement stage, and their grading."""
        assert self.grading is not None
        recipe = replace(recipe, max_length=recipe.max_length - 1)

        def tasks(names: tuple[str, ...]) -> Tasks:
            return Tasks([self.folder / name for name in names], self.tokenizer, recipe)

        training = tasks(spec.training)
        return Exercise(self.grading, training, training if spec.validation is None else tasks((spec.validation,)))

    def _split(self, rows: Rows, spec: StageSpec, shelf: Shelf) -> tuple[Rows, Rows]:
        """(training rows, held-out rows)."""
        share = spec.validation_split
        if spec.training not in self.held_out:
            self.held_out[spec.training] = shelf.keep("held-out", lambda: held_out_groups(rows, share, self.seed))
        is_held_out = numpy.isin(rows.groups, self.held_out[spec.training])
        train, held_out = rows.where(~is_held_out), rows.where(is_held_out)
        if share > 0 and not len(held_out) and len(train) > 1:
            message = "No row is held out for validation: too many rows share a prompt. Give a 'validation_file'."
            self.events.message(message, level="warn")
        return train, held_out

    def _warn_of_repeated(self, train: Rows, held_out: Rows) -> int:
        """Number of validation rows whose prompt is also in the training rows. Warns if there are any."""
        repeated = int(numpy.isin(held_out.groups, train.groups).sum())
        if repeated:
            self.events.message(
                f"{repeated} of {len(held_out)} validation rows have a prompt that is also in the training rows. "
                "Their metrics partly measure memorisation.",
                level="warn",
                data={"code": "validation_prompts_in_training", "rows": repeated, "validation_rows": len(held_out)},
            )
        return repeated

    def _rows(self, names: tuple[str, ...], recipe: Recipe, param: str, shelf: Shelf) -> tuple[Rows, tuple[str, ...]]:
        """(the rows of the files `names`, notes about them for the user)."""
        files, tally = list[Rows](), Tally()

        def report(rows: int) -> None:
            self.events.working("tokenizing", sum(map(len, files)) + rows)

        for name in names:
            report(0)
            file_rows, file_tally = load(self.folder / name, self.tokenizer, recipe, self.cache, report)
            files.append(file_rows)
            tally.add(file_tally)
        rows = Rows.together(files, shelf)
        if not len(rows):
            refusal = next(iter(tally.details.values()), None)
            if refusal is not None:
                raise UserError("chat_template_error", f"No row can be trained on. {refusal}", param)
            raise UserError("no_training_rows", f"No row of '{', '.join(names)}' has a token to learn.", param)
        notes = tuple(row_notes(tally, recipe, len(rows)))
        for note in notes:
            self.events.message(note, level="warn")
        return rows, notes


NEVER_ENDS = (
    "The chat template writes no end token after an answer, so the model cannot learn to stop. "
    "'append_eos': true appends the end-of-sequence token."
)


def row_notes(tally: Tally, recipe: Recipe, rows: int) -> Iterator[str]:
    """Sentences for the user about rows that were cut, left out or used in an unexpected way. `rows`: those kept."""
    if tally.prompts or tally.answers or tally.lost or tally.long:
        side = {"keep_end": " from the left", "keep_start": " from the right", "drop": ""}[recipe.truncation]
        dropped = f" {tally.long} rows are left out because they are longer." if tally.long else ""
        yield (
            f"Cut to max_length {recipe.max_length}: {tally.prompts} prompts{side}, and the answers of "
            f"{tally.answers} rows.{dropped} {tally.lost} rows are left out because they have no token to learn."
        )
    for reason, count in sorted(tally.refused.items()):
        yield f"{count} rows are left out ({reason}). {tally.details[reason]}"
    if tally.templated:
        yield (
            f"{tally.templated} of {rows} prompts already have the form of a chat template. They are used as they are. "
            "'chat_template': true applies the model's template to them too."
        )
    if tally.control_text:
        yield f"{tally.control_text} rows hold text that looks like a control token. It is trained as text."


def held_out_groups(rows: Rows, share: float, seed: int) -> Integers:
    """The groups to hold out for validation, drawn by `seed`: together at most the share `share` of all lines, rounded.

    Rows of a group have the same prompt, so no prompt is on both sides. The pieces of a plain text stay together too.
    If every group is too large, the smallest one is held out, unless it has more than half of the lines.
    """
    if not share:
        return numpy.zeros(0, dtype=numpy.int64)
    pairs = numpy.unique(numpy.stack([rows.groups, rows.places]), axis=1)  # distinct (group, line), [2, pairs]
    names, sizes = numpy.unique(pairs[0], return_counts=True)  # each group, and its number of lines
    target = min(round(share * pairs.shape[1]), pairs.shape[1] - 1)  # lines to hold out
    drawn = (int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:8]) for name in names)
    order = numpy.argsort(numpy.fromiter(drawn, dtype=numpy.uint64, count=len(names)), kind="stable")
    chosen, chosen_lines = [], 0
    for k in order:
        if chosen_lines + sizes[k] <= target:
            chosen.append(names[k])
            chosen_lines += sizes[k]
    if not chosen and target and len(names) > 1:
        smallest = min(order, key=lambda k: sizes[k])
        if 2 * sizes[smallest] <= pairs.shape[1]:
            chosen.append(names[smallest])
    return numpy.array(chosen, dtype=numpy.int64)
