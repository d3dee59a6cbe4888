"""The reward of an answer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from app.spec.graders.schemas import AnyGrader, AnySingle, ByModel, Multi, TextSimilarity
from app.spec.graders.similarity import similarity
from app.spec.graders.templates import GradingError, Sample, filled
from app.spec.json_types import JsonObject

Given = Mapping[str, float]
"""The scores of an answer by models, by the names of their sources."""


@dataclass(frozen=True)
class Grade:
    """The `reward` of an answer; None if it could not be graded, and then `error` says why."""

    reward: float | None
    scores: dict[str, float] = field(default_factory=dict)
    """The scores of the graders of `multi`, by name."""
    error: GradingError | None = None


def grade(grader: AnyGrader, answer: str, item: JsonObject, given: Given | None = None) -> Grade:
    """Grade `answer` by `grader`. `item` is the row of the prompt, with all its fields."""
    sample, scores = Sample(answer), dict[str, float]()
    try:
        if not isinstance(grader, Multi):
            return Grade(_score(grader, sample, item, given or {}))
        for name, single in grader.named.items():
            scores[name] = _score(single, sample, item, given or {})
        return Grade(grader.formula()(scores), scores)
    except GradingError as error:
        return Grade(None, scores, error)
    except (ArithmeticError, ValueError) as error:
        message = f"'calculate_output' has no value for these scores: {error}."
        return Grade(None, scores, GradingError("other_error", message))


def _score(grader: AnySingle, sample: Sample, item: JsonObject, given: Given) -> float:
    if isinstance(grader, ByModel):
        if grader.source not in given:
            raise GradingError("other_error", f"The model '{grader.source}' grades in trainings only.")
        if not math.isfinite(given[grader.source]):
            raise GradingError("other_error", f"The model '{grader.source}' gives this answer no finite score.")
        return given[grader.source]
    text, reference = filled(grader.input, sample, item), filled(grader.reference, sample, item)
    if isinstance(grader, TextSimilarity):
        return similarity(grader.evaluation_metric, text, reference)
    match grader.operation:
        case "eq":
            holds = text == reference
        case "ne":
            holds = text != reference
        case "like":
            holds = reference in text
        case "ilike":
            holds = reference.casefold() in text.casefold()
    return float(holds)
