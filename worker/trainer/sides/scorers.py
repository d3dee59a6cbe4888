"""Scores of single answers, by a reward model or a classifier."""

import math

from app.spec.datasets.example import Example
from app.spec.evaluation import Judge
from app.spec.evaluation import Scorer as ScorerSpec
from worker.model_files import folder_at
from worker.trainer import reward
from worker.trainer.errors import UserError
from worker.trainer.scorers import ClassifierScorer, Scorer
from worker.trainer.sides.run import SidesRun


def scores(run: SidesRun, scorer: ScorerSpec | Judge, name: str, answers: list[tuple[Example, str]]) -> list[float]:
    """The score of each (example, answer). A reward model is in the folder of the side `name`.

    Raises `UserError` for a file that is not a classifier.
    """
    model: Scorer
    if scorer.classifier is not None:
        model = ClassifierScorer(run.folder / scorer.classifier.file, f"{name}.classifier.file")
    else:
        folder = folder_at(run.folder / "sides" / name / "base")
        model = reward.RewardModel(folder, run.rendering(name), run.spec.max_length)
    values = model.scores(answers, run.check_stop, run.ranks)
    for (example, _), value in zip(answers, values, strict=True):
        if not math.isfinite(value):
            message = f"Line {example.line}: the answer has no finite score, or the reward model cannot read it."
            raise UserError("chat_template_error", message, f"{name}.{'model' if scorer.model else 'classifier.file'}")
    return values
