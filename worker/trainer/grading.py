"""Grades of the answers that a policy writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from app.spec.datasets.rendering import Rendering
from app.spec.graders.grading import Grade, grade
from app.spec.graders.schemas import Grader, RewardModel, by_models
from worker.model_files import folder_at
from worker.trainer import reward
from worker.trainer.progress import progress
from worker.trainer.ranks import Ranks
from worker.trainer.scorers import ClassifierScorer, Scorer
from worker.trainer.tasks import Task, Tasks


@dataclass(frozen=True)
class Grading:
    """A grader, and its models, which stay in memory.

    Its classifiers are files in the work folder `folder`. Its reward models are there in `graders/0/base` and so on;
    `renderings` says how each renders conversations.
    """

    grader: Grader
    folder: Path
    renderings: Sequence[Rendering]

    @cached_property
    def _models(self) -> dict[str, Scorer]:
        """The models by their sources. Raises `UserError` for a file that is no classifier."""
        models, renderings = dict[str, Scorer](), enumerate(self.renderings)
        for path, grader in by_models(self.grader):
            if isinstance(grader, RewardModel):
                number, rendering = next(renderings)
                place = folder_at(self.folder / "graders" / str(number) / "base")
                models[grader.source] = reward.RewardModel(place, rendering)
            else:
                field = f"method.reinforcement.grader.{path}classifier.file"
                models[grader.source] = ClassifierScorer(self.folder / grader.source, field)
        return models

    def load(self) -> None:
        """Load the models. To be called before the training measures the memory that is left."""
        self._models  # noqa: B018 - they stay

    def grades(self, answered: Sequence[tuple[Task, str]], ranks: Ranks) -> list[Grade]:
        """The grades of answers to tasks. The `ranks`, which have the same answers, share the work of the models."""
        examples = [(task.example, text) for task, text in answered]
        scores = {source: model.scores(examples, progress.mark, ranks) for source, model in self._models.items()}
        own = list[Grade]()
        for k in range(ranks.rank, len(answered), ranks.size):
            (task, text), given = answered[k], {source: values[k] for source, values in scores.items()}
            own.append(grade(self.grader, text, task.item, given))
            progress.mark()
        parts = ranks.gather(own)
        return [parts[k % ranks.size][k // ranks.size] for k in range(len(answered))]


@dataclass(frozen=True)
class Exercise:
    """The work of a reinforcement stage: answer the tasks, and take their grades."""

    grading: Grading
    train: Tasks
    validation: Tasks
