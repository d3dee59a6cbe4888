"""The reward of an answer."""

from dataclasses import dataclass, field

from app.spec.graders.schemas import Multi, StringCheck, TextSimilarity
from app.spec.graders.similarity import similarity
from app.spec.graders.templates import GradingError, Sample, filled
from app.spec.json_types import JsonObject


@dataclass(frozen=True)
class Grade:
    """The `reward` of an answer; None if it could not be graded, and then `error` says why."""

    reward: float | None
    scores: dict[str, float] = field(default_factory=dict)
    """The scores of the graders of `multi`, by name."""
    error: GradingError | None = None


def grade(grader: StringCheck | TextSimilarity | Multi, answer: str, item: JsonObject) -> Grade:
    """Grade `answer` by `grader`. `item` is the row of the prompt, with all its fields."""
    sample, scores = Sample(answer), dict[str, float]()
    try:
        if not isinstance(grader, Multi):
            return Grade(_score(grader, sample, item))
        for name, single in grader.named.items():
            scores[name] = _score(single, sample, item)
        return Grade(grader.formula()(scores), scores)
    except GradingError as error:
        return Grade(None, scores, error)
    except (ArithmeticError, ValueError) as error:
        message = f"'calculate_output' has no value for these scores: {error}."
        return Grade(None, scores, GradingError("other_error", message))


def _score(grader: StringCheck | TextSimilarity, sample: Sample, item: JsonObject) -> float:
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
