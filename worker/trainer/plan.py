"""What a run will do: its stages, their rows, and which rows each optimizer step takes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path

import numpy
import torch

from app.spec.datasets.example import Kind
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.rendering import Rendering
from app.spec.hyperparameters import DEFAULT_MAX_LENGTH, DPOHyperparameters, SupervisedHyperparameters
from app.spec.job import DEFAULT_VALIDATION_SPLIT, JobSpec
from worker.trainer.cache import Cache
from worker.trainer.data import Recipe, Response, Row, Tally, Tokenizer
from worker.trainer.dataset import Integers, Rows, load
from worker.trainer.events import Events, UserError
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
        """Rows that stand together in every epoch: pairs of one prompt, so that it is computed once for them.

        At most a quarter of a batch is of one prompt.
        """
        if isinstance(self.hyperparameters, SupervisedHyperparameters):
            return Groups(tuple((number,) for number in range(len(self.train))))
        most, groups = max(1, self.batch_size // 4), []
        open_groups: dict[bytes, list[int]] = {}
        for number, prompt in enumerate(self.train.prompts()):
            group = open_groups.get(prompt)
            if group is None or len(group) == most:
                group = open_groups[prompt] = []
                groups.append(group)
            group.append(number)
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
    split = spec.validation_split or 0.0
    training = (spec.training_file, *(spec.more_training_files or []))
    if spec.method.type == "supervised":
        assert spec.method.supervised is not None
        supervised = spec.method.supervised.hyperparameters
        files = (training, spec.validation_file, split, "training_file")
        return [loader.stage("sft", supervised, *files, "method.supervised.hyperparameters", spec.mapping)]
    assert spec.method.dpo is not None
    dpo = spec.method.dpo.hyperparameters
    files = (training, spec.validation_file, split, "training_file")
    result = [loader.stage("dpo", dpo, *files, "method.dpo.hyperparameters", spec.mapping)]
    if spec.sft is not None:
        settings = spec.sft.hyperparameters
        mapping = spec.mapping if spec.sft.training_file is None else spec.sft.mapping
        if spec.sft.training_file is not None:
            own = split if spec.validation_file is None else DEFAULT_VALIDATION_SPLIT
            share = 0.0 if spec.sft.validation_file else own
            files = ((spec.sft.training_file,), spec.sft.validation_file, share, "sft.training_file")
        result.insert(0, loader.stage("sft", settings, *files, "sft.hyperparameters", mapping))
    return result


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

    def stage(
        self,
        name: str,
        settings: SupervisedHyperparameters | DPOHyperparameters,
        training: tuple[str, ...],
        validation: str | None,
        split: float,
        param: str,
        settings_param: str,
        mapping: Mapping | None,
    ) -> Stage:
        """A stage on the files `training`, validated on `validation` or on a share of the examples."""
        need = settings.data if isinstance(settings, DPOHyperparameters) else Kind.SUPERVISED
        loss_on = settings.loss_on if isinstance(settings, SupervisedHyperparameters) else "answers"
        most = min(settings.max_length or DEFAULT_MAX_LENGTH, self.context)
        recipe = Recipe(need, most, loss_on, mapping, self.rendering, settings.truncation)
        train, words = self._rows(training, recipe, param)
        if validation is not None:
            held_out, _ = self._rows((validation,), recipe, param.replace("training", "validation"))
        else:
            if training not in self.held_out:  # the stages of a job on one file hold out the same prompts
                self.held_out[training] = held_out_groups(train, split, self.seed)
            inside = numpy.isin(train.groups, self.held_out[training])
            train, held_out = train.where(~inside), train.where(inside)
            if split > 0 and not len(held_out) and len(train) > 1:
                message = "No row is held out for validation: too many of them ask the same. Give a 'validation_file'."
                self.events.message(message, level="warn")
        repeated = int(numpy.isin(held_out.groups, train.groups).sum())
        if repeated:
            self.events.message(
                f"{repeated} of {len(held_out)} validation rows ask what training rows ask too: what is measured on "
                "them is in part what was learned by heart.",
                level="warn",
                data={"code": "validation_prompts_in_training", "rows": repeated, "validation_rows": len(held_out)},
            )
        if need == Kind.LABELLED:
            train, held_out = with_mismatches(train, recipe.max_length), with_mismatches(held_out, recipe.max_length)
        return Stage(name, settings, train, held_out, self.seed, settings_param, words, repeated)

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


def with_mismatches(rows: Rows, max_length: int) -> Rows:
    """The same rows, each with the answer of the next row of another prompt behind its own.

    KTO estimates how far the policy is from its reference on answers that have nothing to do with the prompt
    (arXiv:2402.01306, Sec. 4.1). Where all rows have one prompt, it is the answer of the next row.
    """
    keys, count = rows.prompts(), len(rows)
    following = list(range(1, count + 1))  # the next row of another prompt, going round
    for number in reversed(range(2 * count)):
        this, after = number % count, (number + 1) % count
        following[this] = after if keys[after] != keys[this] else following[after]

    def mismatched(number: int, row: Row) -> Row:
        nearby = following[number] % count
        other = rows[nearby if keys[nearby] != keys[number] else (number + 1) % count].responses[0]
        room = max(1, max_length - len(row.prompt))
        ids, scored = other.ids[:room], other.scored[:room]
        return replace(row, responses=(row.responses[0], Response(ids, scored if any(scored) else (True,) * len(ids))))

    return Rows.of(mismatched(number, row) for number, row in enumerate(rows))
