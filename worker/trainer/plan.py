"""What a run will do: its stages, their rows, and which rows each optimizer step takes."""

import math
import random
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from app.datasets.example import Kind
from app.datasets.mapping import Mapping
from app.jobs.hyperparameters import DPOHyperparameters, SupervisedHyperparameters
from app.jobs.spec import DEFAULT_VALIDATION_SPLIT, JobSpec
from worker.trainer.cache import Cache
from worker.trainer.data import Recipe, Response, Row, Tokenizer, Truncation
from worker.trainer.dataset import Rows, load
from worker.trainer.events import Events, UserError

DEFAULT_MAX_LENGTH = 2048
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
    cut: Truncation = field(default_factory=Truncation)

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
        warmup = math.ceil(h.warmup_ratio * self.steps)
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
    loader = _Loader(folder, tokenizer, context, cache, events, spec.seed or 0)
    split = spec.validation_split or 0.0
    if spec.method.type == "supervised":
        assert spec.method.supervised is not None
        supervised = spec.method.supervised.hyperparameters
        files = (spec.training_file, spec.validation_file, split, "training_file")
        return [loader.stage("sft", supervised, *files, "method.supervised.hyperparameters", spec.mapping)]
    assert spec.method.dpo is not None
    dpo = spec.method.dpo.hyperparameters
    files = (spec.training_file, spec.validation_file, split, "training_file")
    result = [loader.stage("dpo", dpo, *files, "method.dpo.hyperparameters", spec.mapping)]
    if spec.sft is not None:
        settings = spec.sft.hyperparameters
        mapping = spec.mapping if spec.sft.training_file is None else spec.sft.mapping
        if spec.sft.training_file is not None:
            own = split if spec.validation_file is None else DEFAULT_VALIDATION_SPLIT
            share = 0.0 if spec.sft.validation_file else own
            files = (spec.sft.training_file, spec.sft.validation_file, share, "sft.training_file")
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

    def stage(
        self,
        name: str,
        settings: SupervisedHyperparameters | DPOHyperparameters,
        training: str,
        validation: str | None,
        split: float,
        param: str,
        settings_param: str,
        mapping: Mapping | None,
    ) -> Stage:
        """A stage on the file `training`, validated on `validation` or on a share of the examples."""
        need = settings.data if isinstance(settings, DPOHyperparameters) else Kind.SUPERVISED
        loss_on = settings.loss_on if isinstance(settings, SupervisedHyperparameters) else "answers"
        recipe = Recipe(need, min(settings.max_length or DEFAULT_MAX_LENGTH, self.context), loss_on, mapping)
        train, cut = self._rows(training, recipe, param)
        if validation is not None:
            held_out, _ = self._rows(validation, recipe, param.replace("training", "validation"))
        else:
            # By line, so that the stages of a job hold out the same examples, and a text's pieces stay together.
            seed, numbers = self.seed, sorted(set(train.lines))
            numbers.sort(key=lambda line: random.Random(f"{seed} {line}").random())  # noqa: S311
            chosen = set(numbers[: min(round(split * len(numbers)), len(numbers) - 1)])
            inside = [line in chosen for line in train.lines]
            train, held_out = train.where([not one for one in inside]), train.where(inside)
        if need == Kind.LABELLED:
            train, held_out = with_mismatches(train, recipe.max_length), with_mismatches(held_out, recipe.max_length)
        return Stage(name, settings, train, held_out, self.seed, settings_param, cut)

    def _rows(self, name: str, recipe: Recipe, param: str) -> tuple[Rows, Truncation]:
        found, cut = load(self.folder / name, self.tokenizer, recipe, self.cache)
        if not len(found):
            raise UserError("no_training_rows", f"No row of '{name}' has a token to learn.", param)
        if cut.prompts or cut.answers or cut.lost:
            self.events.message(
                f"Cut to max_length {recipe.max_length}: {cut.prompts} prompts (from the left), {cut.answers} rows "
                f"with an answer cut short, {cut.lost} left out because no token to learn was left.",
                level="warn",
            )
        return found, cut


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
