"""Grades of the answers that a policy writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from app.spec.datasets.rendering import Rendering
from app.spec.graders.grading import Grade, grade
from app.spec.graders.schemas import Grader, reward_models
from worker.model_files import folder_at
from worker.trainer.progress import progress
from worker.trainer.ranks import Ranks
from worker.trainer.reward import RewardModel
from worker.trainer.tasks import Task, Tasks


@dataclass(frozen=True)
class Grading:
    """A grader, and its reward models, which stay in memory.

    The models are in `folder`/0/base, `folder`/1/base, …; `renderings` says how each renders conversations.
    """

    grader: Grader
    folder: Path
    renderings: Sequence[Rendering]

    @cached_property
    def _models(self) -> dict[str, RewardModel]:
        """The reward models by name."""
        places = zip(reward_models(self.grader), self.renderings, strict=True)
        return {
            grader.model: RewardModel(folder_at(self.folder / str(number) / "base"), rendering)
            for number, ((_, grader), rendering) in enumerate(places)
        }

    def grades(self, answered: Sequence[tuple[Task, str]], ranks: Ranks) -> list[Grade]:
        """The grades of answers to tasks. The `ranks`, which have the same answers, share the work of the models."""
        examples = [(task.example, text) for task, text in answered]
        rewards = {name: model.scores(examples, progress.mark, ranks) for name, model in self._models.items()}
        return [
            grade(self.grader, text, task.item, {name: values[k] for name, values in rewards.items()})
            for k, (task, text) in enumerate(answered)
        ]


@dataclass(frozen=True)
class Exercise:
    """What a reinforcement stage does with its rows: answer the tasks, and take their grades."""

    grading: Grading
    train: Tasks
    validation: Tasks
