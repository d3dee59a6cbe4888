"""Grades of the answers that a policy writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from app.spec.datasets.example import Example
from app.spec.datasets.rendering import Rendering
from app.spec.graders.grading import Grade, grade
from app.spec.graders.schemas import Grader, RewardModel, by_models
from app.spec.json_types import JsonObject
from worker.model_files import folder_at
from worker.trainer import reward
from worker.trainer.progress import progress
from worker.trainer.ranks import Ranks
from worker.trainer.scorers import ClassifierScorer, Scorer
from worker.trainer.tasks import Tasks


class Answered(Protocol):
    """A prompt whose answers are graded."""

    @property
    def example(self) -> Example: ...

    @property
    def item(self) -> JsonObject:
        """The row of the prompt, with all its fields."""


@dataclass(frozen=True)
class Grading:
    """A grader, and its models, which stay in memory.

    Its classifiers are files in the work folder `folder`. `reward_models` are (folder of the model, how it renders
    conversations), in the order of the grader. `field` is the grader's field in the spec, for errors.
    """

    grader: Grader
    folder: Path
    reward_models: Sequence[tuple[Path, Rendering]]
    field: str = "method.reinforcement.grader"

    @cached_property
    def _models(self) -> dict[str, Scorer]:
        """The models by their sources. Raises `UserError` for a file that is no classifier."""
        models, reward_models = dict[str, Scorer](), iter(self.reward_models)
        for path, grader in by_models(self.grader):
            if isinstance(grader, RewardModel):
                place, rendering = next(reward_models)
                models[grader.source] = reward.RewardModel(folder_at(place), rendering)
            else:
                field = f"{self.field}.{path}classifier.file"
                models[grader.source] = ClassifierScorer(self.folder / grader.source, field)
        return models

    def load(self) -> None:
        """Load the models. To be called before the training measures the memory that is left."""
        self._models  # noqa: B018 - they stay

    def grades(self, answered: Sequence[tuple[Answered, str]], ranks: Ranks) -> list[Grade]:
        """The grades of answers to prompts. The `ranks`, which have the same answers, share the work of the models."""
        examples = [(prompt.example, text) for prompt, text in answered]
        scores = {source: model.scores(examples, progress.mark, ranks) for source, model in self._models.items()}
        own = list[Grade]()
        for k in range(ranks.rank, len(answered), ranks.size):
            (prompt, text), given = answered[k], {source: values[k] for source, values in scores.items()}
            own.append(grade(self.grader, text, prompt.item, given))
            progress.mark()
        parts = ranks.gather(own)
        return [parts[k % ranks.size][k // ranks.size] for k in range(len(answered))]


@dataclass(frozen=True)
class Exercise:
    """The work of a reinforcement stage: answer the tasks, and take their grades."""

    grading: Grading
    train: Tasks
    validation: Tasks
