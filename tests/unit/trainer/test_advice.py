"""Advice on a training: it comes at the right moment, only once, and only if something is wrong."""

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from app.spec.hyperparameters import DPOHyperparameters, ReinforcementHyperparameters, SupervisedHyperparameters
from tests.helpers.trainer import Event, dpo_method, make_pairs, make_row, make_work_folder, parse
from worker.trainer.advice import Advice, Advisor
from worker.trainer.dataset import Rows
from worker.trainer.errors import Stopped
from worker.trainer.events import Event as TrainerEvent
from worker.trainer.events import Events, Metrics
from worker.trainer.loop import train
from worker.trainer.plan import Stage
from worker.trainer.run import TrainingRun

HEALTHY = {
    "loss": 0.5, "grad_norm": 1.0, "rewards/margins": 1.0, "rewards/accuracies": 0.8, "logps/chosen": -98.0,
    "logratios/chosen": 2.0, "logratios/rejected": -3.0,
}  # fmt: skip


def make_stage(*, steps: int = 40, settings: Any = None, longer_chosen: int = 30) -> Stage:
    """A stage with 60 validation pairs. In `longer_chosen` of them, the chosen answer is the longer one."""
    rows = [make_row(k, 5, *((9, 4) if k < longer_chosen else (4, 9))) for k in range(60)]
    settings = settings or DPOHyperparameters(max_steps=steps)
    return Stage("dpo", settings, Rows.of(rows), Rows.of(rows), seed=0)


def advise(*entries: dict[str, float], stage: Stage | None = None) -> list[tuple[int, str]]:
    """(number of the entry, code) of each piece of advice."""
    advisor = Advisor(stage or make_stage())
    return [(number, advice.code) for number, entry in enumerate(entries) for advice in advisor.look(entry)]


def test_a_healthy_training_gets_no_advice() -> None:
    before = {"eval/loss": 0.69, "eval/logps/chosen": -100.0, "eval/logps/rejected": -100.0}
    validated = HEALTHY | {
        "eval/loss": 0.5, "eval/logps/chosen": -97.0, "eval/logps/rejected": -104.0, "eval/rewards/longer_preferred": 0.6,
    }  # fmt: skip
    assert advise(before, *[HEALTHY] * 30, validated) == []
    assert list(Advisor(make_stage()).before()) == []


@pytest.mark.parametrize(
    ("changed", "code", "first"),
    [
        ({"logratios/chosen": -8.0, "logratios/rejected": -20.0, "logps/chosen": -108.0}, "likelihood_displacement", 9),
        ({"rewards/margins": 10.5}, "margins_exploding", 9),
        ({"rewards/accuracies": 1.0}, "accuracy_saturated", 9),
        ({"grad_norm": 0.0}, "nothing_is_learned", 9),
    ],
)
def test_a_problem_that_lasts_for_several_batches_is_reported_once(
    changed: dict[str, float], code: str, first: int
) -> None:
    assert advise(*[HEALTHY | changed] * 30) == [(first, code)]


WRITTEN = {
    "loss": 0.0, "grad_norm": 1.0, "reward": 0.5, "kl": 1.0, "rollouts/without_signal": 0.5, "rollouts/entropy": 2.0,
    "rollouts/tokens": 50.0, "eval/loss": -0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"rollouts/without_signal": 0.93}, "rewards_all_equal"),
        ({"rollouts/entropy": 0.3}, "entropy_collapsed"),
        ({"rollouts/tokens": 104.0}, "answers_grow"),
        ({"rollouts/without_signal": 0.85, "rollouts/entropy": 0.5, "rollouts/tokens": 95.0, "eval/loss": 0.5}, None),
    ],
)
def test_reinforcement_that_learns_nothing_or_something_else_is_reported_once(
    changed: dict[str, float], code: str | None
) -> None:
    """After ten such steps. The first step is healthy."""
    stage = make_stage(settings=ReinforcementHyperparameters(max_steps=40))
    entries = [WRITTEN, *[WRITTEN | changed] * 30]
    assert advise(*entries, stage=stage) == ([] if code is None else [(10, code)])


@pytest.mark.parametrize(
    "changed",
    [
        {"logratios/chosen": -4.0, "logratios/rejected": -20.0, "logps/chosen": -104.0},  # less than a twentieth
        {"logratios/chosen": -8.0, "logratios/rejected": 1.0, "logps/chosen": -108.0},  # only one side falls
        {"rewards/margins": 9.9},
        {"rewards/accuracies": 0.99},
    ],
)
def test_values_within_the_thresholds_are_not_reported(changed: dict[str, float]) -> None:
    assert advise(*[HEALTHY | changed] * 30) == []


def test_accuracy_that_saturates_only_at_the_end_is_not_reported() -> None:
    late = [HEALTHY] * 31 + [HEALTHY | {"rewards/accuracies": 1.0}] * 9
    assert advise(*late) == []


def test_validation_is_compared_with_the_validation_before_the_first_step() -> None:
    before = {"eval/loss": 0.69, "eval/logps/chosen": -100.0, "eval/logps/rejected": -100.0}
    assert advise(before, HEALTHY, HEALTHY | {"eval/loss": 0.70}) == []
    assert advise(before, HEALTHY, HEALTHY | {"eval/loss": 0.72}, HEALTHY | {"eval/loss": 0.9}) == [
        (2, "validation_worse_than_at_start")
    ]
    fallen = {"eval/logps/chosen": -106.0, "eval/logps/rejected": -130.0}
    assert advise(before, HEALTHY | fallen) == [(1, "likelihood_displacement")], (
        "one validation is enough, since its rows are always the same"
    )


def test_length_drift_is_measured_against_the_preferences_in_the_data() -> None:
    longer = HEALTHY | {"eval/rewards/longer_preferred": 0.9}
    assert advise(HEALTHY, longer) == [(1, "length_drift")]
    assert advise(HEALTHY, longer, stage=make_stage(longer_chosen=50)) == [], (
        "the data prefers the longer answer as often"
    )


def test_an_sft_stage_gets_no_advice_about_rewards() -> None:
    sft_stage = make_stage(settings=SupervisedHyperparameters(max_steps=40))
    assert advise(*[HEALTHY | {"rewards/margins": 20.0, "grad_norm": 0.0}] * 20, stage=sft_stage) == []
    assert advise({"eval/loss": 1.0}, HEALTHY | {"eval/loss": 1.2}, stage=sft_stage) == [
        (1, "validation_worse_than_at_start")
    ]


def test_pairs_whose_sides_are_identical_after_truncation_are_reported() -> None:
    row = make_row(1, 5, 4)
    same = Rows.of([make_row(0, 5, 4, 6), type(row)(1, row.prompt, (row.responses[0], row.responses[0]))])
    (advice,) = Advisor(Stage("dpo", DPOHyperparameters(), same, Rows.of([]), seed=0)).before()
    assert isinstance(advice, Advice) and advice.code == "identical_sides" and advice.figures["rows"] == 1.0


def warnings(events: list[Event]) -> list[tuple[str, int]]:
    return [(event["data"]["code"], event["data"]["step"]) for event in events
            if event["kind"] == "message" and event["data"]]  # fmt: skip


def test_a_resumed_run_does_not_repeat_the_warnings_of_its_first_attempt(llama: Path, tmp_path: Path) -> None:
    """A learning rate that is far too high causes what the warnings describe."""
    spec = {
        "adapter": {"r": 8}, "quantization": "none", "seed": 1, "validation_split": 0.2,
        "method": dpo_method(max_steps=24, batch_size=8, learning_rate=0.05, beta=1.0, eval_every=4, checkpoint_every=8),
    }  # fmt: skip
    whole, stopped = (make_work_folder(tmp_path / name, llama, spec, train=make_pairs(40)) for name in ("a", "b"))
    stream = io.StringIO()
    train(TrainingRun.of(whole, Events(stream), threading.Event()))
    expected = warnings(parse(stream))
    codes = {code for code, _ in expected}
    assert {"accuracy_saturated", "margins_exploding"} & codes and len(codes) == len(expected)
    stopping, stream = threading.Event(), io.StringIO()

    class StopAtStep15(Events):
        def emit(self, event: TrainerEvent) -> None:
            super().emit(event)
            if isinstance(event, Metrics) and event.step == 15:
                stopping.set()

    with pytest.raises(Stopped):
        train(TrainingRun.of(stopped, StopAtStep15(stream), stopping))
    checkpoint = json.loads([line for line in stream.getvalue().splitlines() if '"checkpoint"' in line][-1])
    (stopped / checkpoint["path"]).rename(stopped / "resume")
    train(TrainingRun.of(stopped, Events(stream), threading.Event()))
    assert warnings(parse(stream)) == expected
