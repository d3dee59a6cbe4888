"""Models that score single answers: reward models and classifiers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from app.spec.datasets.example import Example
from worker.classifier import BadClassifier, LinearClassifier
from worker.trainer.data import prompt_text
from worker.trainer.errors import UserError
from worker.trainer.ranks import Ranks

Answered = Sequence[tuple[Example, str]]
"""Examples, each with an answer to it."""


class Scorer(Protocol):
    """Scores answers. `worker.trainer.reward.RewardModel` is one too."""

    def scores(self, answered: Answered, check_stop: Callable[[], None], ranks: Ranks) -> list[float]:
        """The score of each answer to its example."""


class ClassifierScorer:
    """Scores answers by the classifier in a file. `field` names it in errors. Raises `UserError` if it is none."""

    def __init__(self, path: Path, field: str) -> None:
        try:
            self._classifier = LinearClassifier.load(path)
        except BadClassifier as error:
            raise UserError("invalid_file", f"The file is not a classifier: {error}", field) from error

    def scores(self, answered: Answered, check_stop: Callable[[], None], ranks: Ranks) -> list[float]:
        """The logit of each prompt with its answer, as for a model without a chat template. Each rank computes all."""
        return [
            self._classifier.score(prompt_text(example) + ("" if isinstance(example.prompt, str) else " ") + answer)
            for example, answer in answered
        ]
