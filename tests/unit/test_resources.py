"""The devices that a job asks for: which bodies are taken, and how the others are refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from app.errors import describe_validation_error
from app.spec.job import JobSpec

BODY = {"model": "base", "training_file": "pairs"}


@pytest.mark.parametrize(
    ("gpus", "least", "most"),
    [(None, 1, 1), ("auto", 1, 1), (3, 3, 3), ({"max": 4}, 1, 4), ({"min": 2, "max": 2}, 2, 2)],
)
def test_a_number_a_range_or_nothing_says_how_many_devices_a_job_takes(gpus: Any, least: int, most: int) -> None:
    resources = JobSpec.model_validate(BODY | {"resources": {"gpus": gpus}}).resources
    assert (resources.least, resources.most) == (least, most)


@pytest.mark.parametrize(
    ("resources", "param", "reason"),
    [
        ({"gpus": 0}, "resources.gpus", "greater than or equal to 1"),
        ({"gpus": "two"}, "resources.gpus", "a valid integer"),
        ({"gpus": {"min": 4, "max": 2}}, "resources.gpus.min", "'min' (4) is larger than 'max' (2)"),
        ({"gpus": {"min": 4}}, "resources.gpus.max", "Missing required parameter"),
        ({"gpus": {"max": 2, "mix": 1}}, "resources.gpus.mix", "Unknown parameter"),
        ({"nodes": 0}, "resources.nodes", "greater than or equal to 1"),
    ],
)
def test_what_is_wrong_is_named_with_its_field(resources: Any, param: str, reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(BODY | {"resources": resources})
    (error,) = caught.value.errors()
    message, named, _ = describe_validation_error({**error, "loc": ("body", *error["loc"])})
    assert named == param and reason in message


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"adapter": "none", "method": {"type": "dpo", "dpo": {"hyperparameters": {"optimizer": "adamw_8bit"}}}},
            "The optimizer 'adamw_8bit' cannot be sharded; use 'adamw'",
        ),
        (
            {
                "adapter": "none",
                "method": {"type": "dpo", "dpo": {"hyperparameters": {"sync_reference": {"alpha": 0.5, "steps": 1}}}},
            },
            "cannot be sharded with 'method.dpo.hyperparameters.sync_reference'",
        ),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"compile": True}}}},
            "drop 'method.dpo.hyperparameters.compile'",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate(BODY | fields | {"parallel": {"shard": True}})
    (error,) = caught.value.errors()
    message, named, _ = describe_validation_error({**error, "loc": ("body", *error["loc"])})
    assert named == "parallel.shard" and reason in message
    JobSpec.model_validate(BODY | fields | {"parallel": {"shard": "auto"}})


def test_what_is_not_stated_is_not_stored() -> None:
    """A worker of the version before does not know the fields."""
    stored = JobSpec.model_validate(BODY).resolved().to_store()
    assert not {"resources", "parallel"} & stored.keys()
    stated = JobSpec.model_validate(BODY | {"resources": {"gpus": 2}, "parallel": {"virtual_ranks": 4}})
    assert JobSpec.stored(stated.resolved().to_store()).resources.most == 2
    assert "shard" not in stated.to_store()["parallel"]
    for shard in (True, False):
        sharded = JobSpec.model_validate(BODY | {"parallel": {"shard": shard}})
        assert JobSpec.stored(sharded.resolved().to_store()).parallel.shard is shard
