"""Graders on the wire, by OpenAI's contract."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, StringConstraints, model_validator

from app.spec.graders.grading import Grade
from app.spec.graders.schemas import Grader
from app.spec.json_types import JsonObject
from app.spec.schema_base import NO_NUL, Defaulted, Strict, plain_json

MAX_SAMPLE_CHARACTERS, MAX_ITEM_BYTES = 1 << 20, 1 << 20
EXAMPLE: JsonObject = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}


class ValidateGrader(Strict):
    """The body of `POST /v1/fine_tuning/alpha/graders/validate`."""

    model_config = ConfigDict(json_schema_extra={"example": {"grader": EXAMPLE}})

    grader: Grader


class ValidGrader(BaseModel):
    """A grader that a training can use."""

    grader: JsonObject


class RunGrader(Defaulted):
    """The body of `POST /v1/fine_tuning/alpha/graders/run`."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"grader": EXAMPLE, "model_sample": "42", "item": {"answer": "42"}}}
    )

    grader: Grader
    model_sample: Annotated[str, StringConstraints(max_length=MAX_SAMPLE_CHARACTERS, pattern=NO_NUL)]
    """The answer to grade: `{{sample.output_text}}`, and `{{sample.output_json}}` if it is JSON."""
    item: JsonObject = {}
    """The row of its prompt: `{{item.FIELD}}`."""

    @model_validator(mode="after")
    def _item_is_plain(self) -> Self:
        plain_json(self.item, "item", MAX_ITEM_BYTES)
        return self


class GradingErrors(BaseModel):
    """The reason why a grader could not grade: at most one is true."""

    formula_parse_error: bool = False
    sample_parse_error: bool = False
    truncated_observation_error: bool = False
    unresponsive_reward_error: bool = False
    invalid_variable_error: bool = False
    other_error: bool = False
    python_grader_server_error: bool = False
    python_grader_server_error_type: str | None = None
    python_grader_runtime_error: bool = False
    python_grader_runtime_error_details: str | None = None
    model_grader_server_error: bool = False
    model_grader_refusal_error: bool = False
    model_grader_parse_error: bool = False
    model_grader_server_error_details: str | None = None
    message: str | None = None
    """The error as a sentence."""


class GradingMetadata(BaseModel):
    """How the answer was graded."""

    name: str
    type: str
    scores: dict[str, float]
    """The scores of the graders of `multi`, by name."""
    errors: GradingErrors
    execution_time: float
    """Seconds."""
    token_usage: int | None = None
    sampled_model_name: str | None = None


class GraderRun(BaseModel):
    """The grade of an answer. An answer that could not be graded has the reward 0, and an error."""

    reward: float
    sub_rewards: dict[str, float]
    metadata: GradingMetadata
    model_grader_token_usage_per_model: dict[str, int]

    @classmethod
    def of(cls, grader: Grader, grade: Grade, seconds: float) -> "GraderRun":
        errors = GradingErrors()
        if grade.error is not None:
            errors = GradingErrors(**{grade.error.flag: True, "message": str(grade.error)})
        metadata = GradingMetadata(
            name=grader.name, type=grader.type, scores=grade.scores, errors=errors, execution_time=seconds
        )
        return cls(
            reward=grade.reward or 0.0,
            sub_rewards=grade.scores,
            metadata=metadata,
            model_grader_token_usage_per_model={},
        )
