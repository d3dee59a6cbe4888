"""Scores of single answers, by a reward model or a classifier."""

from app.spec.datasets.example import Example
from app.spec.evaluation import Judge, Scorer
from worker.classifier import BadClassifier, LinearClassifier
from worker.model_files import folder_at
from worker.trainer import reward
from worker.trainer.data import prompt_text
from worker.trainer.errors import UserError
from worker.trainer.evaluation.run import EvaluationRun


def scores(run: EvaluationRun, scorer: Scorer | Judge, name: str, answers: list[tuple[Example, str]]) -> list[float]:
    """The score of each (example, answer). A reward model is in the folder of the side `name`.

    Raises `UserError` for a file that is not a classifier.
    """
    if scorer.classifier is not None:
        try:
            classifier = LinearClassifier.load(run.folder / scorer.classifier.file)
        except BadClassifier as error:
            message = f"The file is not a classifier: {error}"
            raise UserError("invalid_file", message, f"{name}.classifier.file") from error
        return [classifier.score(_as_text(example, text)) for example, text in answers]
    folder = folder_at(run.folder / "sides" / name / "base")
    model = reward.RewardModel(folder, run.rendering(name), run.spec.max_length)
    return model.scores(answers, run.check_stop, run.ranks)


def _as_text(example: Example, answer: str) -> str:
    """Prompt and answer as one text, as for a model without a chat template."""
    return prompt_text(example) + ("" if isinstance(example.prompt, str) else " ") + answer
