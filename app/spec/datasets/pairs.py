"""The pairs that a row with several ranked answers gives."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from app.spec.datasets.errors import DatasetError
from app.spec.datasets.example import Example

Rule = Literal["all", "best_worst", "best_random"]


@dataclass(frozen=True)
class PairRule:
    """Which answers of a row are compared: a better one with a worse one, from its ranked answers."""

    rule: Rule = "all"
    min_margin: float | None = None
    """The least difference of the scores of a pair. None: any."""

    @property
    def takes_all(self) -> bool:
        """Whether every two answers are a pair."""
        return self.rule == "all" and self.min_margin is None

    def pairs(self, example: Example) -> Iterator[Example]:
        """The pairs of `example`. Raises `DatasetError` if it lacks the scores for a margin."""
        answers, scores = example.responses, example.scores
        if self.min_margin is not None and not scores:
            reason = "is missing: 'min_margin' needs the score of each answer"
            raise DatasetError(example.line, "scores", reason)
        for better, worse in self._places(example):
            if self.min_margin is not None and scores[better] - scores[worse] < self.min_margin:
                continue
            yield example.with_responses((answers[better], answers[worse]))

    def _places(self, example: Example) -> Iterator[tuple[int, int]]:
        count = len(example.responses)
        match self.rule:
            case "all":
                yield from ((better, worse) for better in range(count) for worse in range(better + 1, count))
            case "best_worst":
                yield 0, count - 1
            case "best_random":  # the same one in each run: it depends on the texts alone
                text = repr((example.prompt_key, example.responses)).encode()
                drawn = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
                yield 0, 1 + drawn % (count - 1)
