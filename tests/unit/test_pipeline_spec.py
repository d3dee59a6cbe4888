"""Pipelines as values: references, and what is refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from app.spec.pipeline import PipelineSpec, references, replaced
from tests.helpers.pipelines import CHECK, DPO, LABEL, POLICY, changed


def pipeline(**fields: Any) -> PipelineSpec:
    return PipelineSpec.model_validate({"stages": [LABEL, DPO, CHECK], "variables": POLICY, "rounds": 3, **fields})


def test_references_are_found_and_replaced_wherever_they_are() -> None:
    spec = pipeline()
    assert list(references(spec.stages[0].body)) == [("writers.0.model", "policy", None)]
    assert list(references(spec.stages[1].body)) == [("model", "policy", None), ("training_file", "label", "file")]
    job = spec.stages[1].with_values({"policy": "tiny", "label.file": "file-9"})
    assert (job.model, job.training_file) == ("tiny", "file-9")  # type: ignore[union-attr]
    assert replaced({"a": ["${x}", "${y.id} and more"]}, {"x": "1"}) == {"a": ["1", "${y.id} and more"]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": []}, "at least 1"),
        ({"stages": [LABEL, LABEL]}, "called 'label'"),
        ({"stages": [LABEL, DPO | {"name": "policy"}]}, "called 'policy'"),
        ({"stages": [DPO, LABEL]}, "no stage 'label' before"),
        ({"stages": [LABEL, changed(DPO, "job", training_file="${label.model}")]}, "and no 'model'"),
        ({"stages": [LABEL, changed(DPO, "job", model="${polcy}")]}, "no variable 'polcy'"),
        ({"stages": [{"name": "x"}]}, "one of them"),
        ({"stages": [DPO | {"evaluation": CHECK["evaluation"]}]}, "one of them"),
        ({"stages": [LABEL, DPO | {"name": "Bad Name"}]}, "match"),
        ({"stages": [LABEL, changed(DPO, "job", method={"type": "magic"})]}, "Input should be"),
        ({"variables": {"policy": {"first": "${dpo.model}"}}}, "Nothing came before"),
        ({"variables": {"policy": {"first": "tiny", "then": "${none.model}"}}}, "no stage 'none'"),
        ({"variables": {"policy": {"first": "tiny", "then": "${policy}"}}}, "no variable 'policy'"),
        ({"best": {"metric": "accuracy"}}, "STAGE/METRIC"),
        ({"best": {"metric": "check/acuracy"}}, "Did you mean 'accuracy'"),
        ({"best": {"metric": "dpo/los"}}, "Did you mean 'loss'"),
        ({"variables": {"policy": {"first": "tiny", "then": "v-${dpo.model}"}}}, "whole text"),
        ({"variables": {"policy": {"first": "v-${dpo.model}"}}}, "whole text"),
        ({"stages": [LABEL, changed(DPO, "job", training_file="a-${label.file}")]}, "whole text"),
        ({"best": {"metric": "other/accuracy"}}, "STAGE/METRIC"),
        ({"stages": [LABEL], "variables": {"policy": {"first": "tiny"}}, "best": {"metric": "label/rows"}}, "no best one"),
        ({"rounds": 0}, "greater than or equal"),
        ({"rounds": 101}, "less than or equal"),
    ],
)  # fmt: skip
def test_a_pipeline_that_cannot_run_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        pipeline(**fields)
