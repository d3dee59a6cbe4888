"""The pipeline spec: the body of `POST /v1/pipelines`. Stages whose inputs are outputs of others, in rounds.

A text that is only `${STAGE.model}`, `${STAGE.file}`, `${STAGE.id}` or `${VARIABLE}` is a reference. It is replaced
when the stage begins.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from app.spec.evaluation import EvaluationSpec
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from app.spec.labelling import LabellingSpec
from app.spec.metrics import measured
from app.spec.quality_gates import require_metric
from app.spec.schema_base import NO_NUL, Defaulted, Metadata, inconsistent

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
StageKind = Literal["job", "evaluation", "labelling"]
AnyStageSpec = JobSpec | EvaluationSpec | LabellingSpec
OUTPUTS: dict[StageKind, tuple[str, ...]] = {"job": ("model", "id"), "evaluation": ("id",), "labelling": ("file", "id")}
"""The outputs of a stage of each kind: the words after its name in a reference."""
REFERENCE = re.compile(r"\$\{([^}.]*)(?:\.([^}]*))?\}")
ONLY_WHOLE = "A reference is a whole text: '${STAGE.model}', '${STAGE.file}', '${STAGE.id}' or '${VARIABLE}'"
MAX_STAGES, MAX_ROUNDS = 16, 100
Text = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=NO_NUL)]


class Stage(Defaulted):
    """One stage: an ordinary job, evaluation or labelling, whose fields may hold references."""

    name: Name
    job: JobSpec | None = None
    evaluation: EvaluationSpec | None = None
    labelling: LabellingSpec | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [kind for kind in OUTPUTS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            field = kinds[1] if kinds else "job"
            raise inconsistent(field, "A stage is a 'job', an 'evaluation' or a 'labelling': one of them")
        return self

    @property
    def kind(self) -> StageKind:
        return next(kind for kind in OUTPUTS if getattr(self, kind) is not None)

    @property
    def spec(self) -> AnyStageSpec:
        spec: AnyStageSpec = getattr(self, self.kind)
        return spec

    @property
    def body(self) -> JsonObject:
        """The fields of its spec that were given."""
        return self.spec.model_dump(mode="json", exclude_unset=True)

    def figures(self) -> list[str]:
        """The names of the metrics that it will have."""
        if isinstance(self.spec, JobSpec):
            return measured(self.spec.stages()[-1].settings.traits, validates=True)
        return self.spec.figures()

    def with_values(self, values: dict[str, str]) -> AnyStageSpec:
        """Its spec with references replaced by `values`. Raises what pydantic raises."""
        return type(self.spec).model_validate(replaced(self.body, values))


class Variable(Defaulted):
    """A value that differs from round to round: `first` in the first, then `then`, with outputs of the round before."""

    first: Text
    then: Text | None = None
    """A reference to an output of a stage. Without it, the value stays."""


class Best(Defaulted):
    """Which round's model is the result."""

    metric: Text
    """STAGE/METRIC, such as `check/win_rate`."""
    goal: Literal["max", "min"] = "max"


class PipelineSpec(Defaulted):
    """The body of `POST /v1/pipelines`."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "name": "iterated DPO",
                "variables": {"policy": {"first": "Llama-3.1-8B", "then": "${dpo.model}"}},
                "stages": [
                    {"name": "label", "labelling": {
                        "data": "file-prompts", "writers": [{"model": "${policy}"}], "sampling": {"samples": 4},
                        "labellers": [{"judge": {"type": "reward_model", "model": "ft:Llama-3.1-8B:default:rm:5e6f"}}],
                    }},
                    {"name": "dpo", "job": {
                        "model": "${policy}", "training_file": "${label.file}", "method": {"type": "dpo"},
                    }},
                ],
                "rounds": 3,
            }
        }
    )  # fmt: skip

    name: Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=NO_NUL)] | None = None
    stages: Annotated[list[Stage], Field(min_length=1, max_length=MAX_STAGES)]
    """A stage begins when all stages that it refers to have succeeded. It refers to earlier ones of the list."""
    variables: Annotated[dict[Name, Variable], Field(max_length=16)] = {}
    """Values that stages name as `${VARIABLE}`."""
    rounds: Annotated[int, Field(ge=1, le=MAX_ROUNDS)] = 1
    """How often all stages are run."""
    stop_at_missed_gate: bool = True
    """End after a round in which a gate was not met."""
    best: Best | None = None
    """Which round's model is the result. The default is the last round's. Only rounds that met all gates count."""
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        kinds: dict[str, StageKind] = {}
        for number, stage in enumerate(self.stages):
            if stage.name in kinds or stage.name in self.variables:
                raise inconsistent(f"stages.{number}.name", f"Two stages or variables are called '{stage.name}'")
            for path in partial_references(stage.body):
                raise inconsistent(f"stages.{number}.{stage.kind}.{path}", ONLY_WHOLE)
            for path, name, output in references(stage.body):
                self._check(f"stages.{number}.{stage.kind}.{path}", name, output, kinds)
            kinds[stage.name] = stage.kind
        for variable, value in self.variables.items():
            for path in partial_references({"first": value.first, "then": value.then}):
                raise inconsistent(f"variables.{variable}.{path}", ONLY_WHOLE)
            for path, name, output in references({"then": value.then}):
                self._check(f"variables.{variable}.{path}", name, output, kinds, variables=False)
            if REFERENCE.fullmatch(value.first):
                raise inconsistent(f"variables.{variable}.first", "Nothing came before the first round: give a value")
        if self.best is not None:
            stage_name, _, metric = self.best.metric.partition("/")
            if stage_name not in kinds or not metric:
                raise inconsistent("best.metric", "'best.metric' is STAGE/METRIC, with a stage of the pipeline")
            if "job" not in kinds.values():
                raise inconsistent("best", "No stage makes a model: there is no best one")
            judged = next(stage for stage in self.stages if stage.name == stage_name)
            require_metric(metric, judged.figures(), "best.metric")
        return self

    def _check(
        self, field: str, name: str, output: str | None, kinds: dict[str, StageKind], *, variables: bool = True
    ) -> None:
        """Refuse a reference to nothing. `kinds` has the stages that it may name."""
        if output is None:
            if not variables or name not in self.variables:
                raise inconsistent(field, f"There is no variable '{name}'")
        elif name not in kinds:
            raise inconsistent(field, f"There is no stage '{name}' before this one")
        elif output not in OUTPUTS[kinds[name]]:
            outputs = " and ".join(f"'{one}'" for one in OUTPUTS[kinds[name]])
            raise inconsistent(field, f"The stage '{name}' has {outputs}, and no '{output}'")

    @property
    def model_stage(self) -> str | None:
        """The last stage that makes a model."""
        return next((stage.name for stage in reversed(self.stages) if stage.kind == "job"), None)


def references(value: object) -> Iterator[tuple[str, str, str | None]]:
    """(path, name, output) of each reference in `value`. A variable has no output."""
    for path, text in _texts(value):
        if found := REFERENCE.fullmatch(text):
            yield path, found[1], found[2]


def partial_references(value: object) -> Iterator[str]:
    """The path of each text in `value` that holds `${` and is no whole reference."""
    return (path for path, text in _texts(value) if "${" in text and not REFERENCE.fullmatch(text))


def _texts(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of each text in `value`."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from _texts(part, f"{path}.{key}" if path else str(key))
    if isinstance(value, str):
        yield path, value


def replaced(value: Any, values: dict[str, str]) -> Any:
    """`value` with each reference replaced. `values` has them by their text between the braces."""
    if isinstance(value, dict):
        return {key: replaced(part, values) for key, part in value.items()}
    if isinstance(value, list):
        return [replaced(part, values) for part in value]
    if isinstance(value, str) and REFERENCE.fullmatch(value):
        return values[value[2:-1]]
    return value
