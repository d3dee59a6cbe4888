"""The registry of metrics has every metric that a job reports."""

from pathlib import Path
from typing import Any

import pytest

from app.spec.metrics import METRICS, VALIDATION
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
}


@pytest.mark.parametrize("name", CASES)
def test_every_metric_that_a_training_reports_is_in_the_registry(llama: Path, tmp_path: Path, name: str) -> None:
    method, rows = CASES[name]
    spec = {"adapter": {"r": 4}, "quantization": "none", "seed": 0, "validation_split": 0.25, "method": method}
    events = run_in_process(make_work_folder(tmp_path, llama, spec, train=rows))
    reported = {metric for event in of_kind(events, "metrics") for metric in event["metrics"]}
    assert "loss" in reported and "eval/loss" in reported
    assert reported <= set(METRICS)
    assert {metric for metric in reported if metric.startswith("eval/")} <= set(VALIDATION)
