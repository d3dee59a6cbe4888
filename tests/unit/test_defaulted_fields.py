"""In job and evaluation bodies, null means the default in every field; in jobs, so does "auto"."""

from collections.abc import Iterator
from typing import Any

import pytest

from app.graders.schemas import RunGrader
from app.keys.schemas import KeySpec
from app.labellings.schemas import VerdictSpec
from app.spec import evaluation, job, labelling, pipeline, sweep
from app.spec.datasets.mapping import Mapping
from app.spec.hyperparameters import Hyperparameters, WeightedLoss
from app.spec.job import JobSpec
from app.spec.resources import DeviceRange
from app.spec.schema_base import Automatic, Defaulted

GRADER = {"type": "string_check", "name": "g", "input": "a", "reference": "b", "operation": "eq"}
REQUIRED: dict[type[Defaulted], dict[str, Any]] = {
    JobSpec: {"model": "base", "training_file": "pairs"},
    WeightedLoss: {"name": "sigmoid"},
    job.MethodSpec: {"type": "dpo"},
    job.ReinforcementMethod: {"grader": GRADER},
    RunGrader: {"grader": GRADER, "model_sample": "yes"},
    job.Wandb: {"project": "tuning"},
    DeviceRange: {"max": 2},
    sweep.SweepSpec: {"job": {"model": "base", "training_file": "p", "method": {"type": "dpo"}}, "grid": {"beta": [1]}},
    evaluation.EvaluationSpec: {"type": "agreement", "data": "pairs"},
    evaluation.JobEvaluation: {"name": "held-out", "type": "preference", "data": "pairs"},
    labelling.LabellingSpec: {
        "data": "prompts",
        "writers": [{"model": "base"}, {"model": "base"}],
        "own_answers": True,
        "labellers": [{"grader": GRADER}],
    },
    pipeline.PipelineSpec: {"stages": [{"name": "dpo", "job": {"model": "base", "training_file": "pairs"}}]},
    pipeline.Variable: {"first": "base"},
    pipeline.Best: {"metric": "dpo/loss"},
    labelling.WriterEndpoint: {"base_url": "https://writer.example.com/v1", "model": "writer"},
    evaluation.Endpoint: {"base_url": "https://judge.example.com/v1", "model": "judge"},
}
"""A valid body of each model that does not take an empty one."""
LEFT_OUT = (
    Hyperparameters, evaluation.Scorer, evaluation.Side, evaluation.Judge, labelling.Writer, labelling.Labeller, pipeline.Stage,
    VerdictSpec,
)  # fmt: skip
"""The base of all hyperparameters, and models of which one of the optional fields must be given."""


def defaulted(model: type[Defaulted] = Defaulted) -> Iterator[type[Defaulted]]:
    """Every model in which null means the default."""
    for derived in model.__subclasses__():
        yield derived
        yield from defaulted(derived)


OPTIONAL = [
    (model, name)
    for model in dict.fromkeys(defaulted())
    for name, field in model.model_fields.items()
    if not field.is_required() and model not in LEFT_OUT
]


@pytest.mark.parametrize(("model", "name"), OPTIONAL, ids=[f"{model.__name__}-{name}" for model, name in OPTIONAL])
def test_null_and_auto_mean_the_default_in_every_field(model: type[Defaulted], name: str) -> None:
    """`model_fields_set` tells a field that was left out from one that was given."""
    given = {**REQUIRED.get(model, {}), name: None}
    assert name not in model.model_validate(given).model_fields_set
    if issubclass(model, Automatic):
        automatic = model.model_validate(given | {name: "auto"})
        assert name not in automatic.model_fields_set and automatic == model.model_validate(given)
    else:
        assert "auto" not in model.UNSET


def test_a_column_or_a_project_may_have_the_name_auto() -> None:
    """Required names and names in other bodies are never taken for the default."""
    assert Mapping.model_validate({"prompt": "auto", "chosen": "a", "rejected": "b"}).prompt == "auto"
    assert KeySpec.model_validate({"name": "ci", "project": "auto"}).project == "auto"
    assert JobSpec.model_validate({"model": "auto", "training_file": "auto"}).model == "auto"
