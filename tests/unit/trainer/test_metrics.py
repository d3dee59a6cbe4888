"""A job reports the metrics that the registry says, and gates accept these alone."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app.spec.job import JobSpec
from app.spec.metrics import METRICS
from app.spec.quality_gates import Gate
from tests.helpers.trainer import dpo_method, make_pairs, make_work_folder, of_kind, run_in_process, sft_method

PAIRS = make_pairs(12)
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair["chosen"], "label": k % 2 == 0} for k, pair in enumerate(PAIRS)
]
STEPS = {"max_steps": 1, "batch_size": 4}
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "sft": (sft_method(**STEPS), PAIRS),
    "pairs": (dpo_method(**STEPS), PAIRS),
    "labelled": (dpo_method(**STEPS, loss="kto"), LABELLED),
    "rewards": (dpo_method(**STEPS, loss="reward_model"), PAIRS),
    "no reference": (dpo_method(**STEPS, loss="simpo"), PAIRS),
    "a sum": (dpo_method(**STEPS, loss=[{"name": "sft"}, {"name": "sigmoid"}]), PAIRS),
}
FILES: dict[str, Any] = {"model": "m", "training_file": "f"}


def accepts_a_gate(body: dict[str, Any], metric: str) -> bool:
    try:
        JobSpec.model_validate(FILES | body | {"gates": [{"metric": metric, "min": 0.0}]})
    except ValidationError as error:
        assert [problem["ctx"]["field"] for problem in error.errors()] == ["gates.0.metric"]
        return False
    return True


@pytest.mark.parametrize("validation_split", [0.25, 0.0])
@pytest.mark.parametrize("name", CASES)
def test_gates_accept_exactly_the_metrics_that_a_training_reports(
    llama: Path, tmp_path: Path, name: str, validation_split: float
) -> None:
    method, rows = CASES[name]
    body = {"adapter": {"r": 4}, "quantization": "none", "seed": 0, "validation_split": validation_split}
    body |= {"method": method}
    events = run_in_process(make_work_folder(tmp_path, llama, body, train=rows))
    reported = {metric for event in of_kind(events, "metrics") for metric in event["metrics"]}
    assert "loss" in reported and ("eval/loss" in reported) == (validation_split > 0)
    assert {metric for metric in METRICS if accepts_a_gate(body, metric)} == reported


def test_a_gate_on_a_metric_that_is_not_measured_says_why() -> None:
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({}, "eval/los", "There is no metric 'eval/los'. Did you mean 'eval/loss'?"),
        ({}, "kl", "SFT has no metric 'kl'."),
        ({"method": {"type": "dpo"}}, "mean_token_accuracy", "The loss 'sigmoid' has no metric 'mean_token_accuracy'."),
        (
            {"validation_split": 0.0},
            "eval/loss",
            "'eval/loss' needs a 'validation_file' or a 'validation_split' above 0.",
        ),
    ]
    for body, metric, message in cases:
        with pytest.raises(ValidationError) as caught:
            JobSpec.model_validate(FILES | body | {"gates": [{"metric": metric, "min": 0.0}]})
        assert [problem["msg"] for problem in caught.value.errors()] == [message]


def test_a_stored_job_keeps_a_gate_that_is_refused_today() -> None:
    """The version that accepted it may not have known that nothing measures it."""
    assert JobSpec.stored(FILES | {"gates": [{"metric": "kl", "min": 0.0}]}).gates == [Gate(metric="kl", min=0.0)]
