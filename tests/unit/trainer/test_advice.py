"""What an expert would say: at the right moment, once, and not where nothing is wrong."""

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from app.spec.hyperparameters import DPOHyperparameters, SupervisedHyperparameters
from tests.helpers.trainer import Event, dpo_method, make_pairs, make_row, make_work_folder, parse
from worker.trainer.advice import Advice, Advisor
from worker.trainer.dataset import Rows
from worker.trainer.errors import Stopped
from worker.trainer.events import Event as TrainerEvent
from worker.trainer.events import Events, Metrics
from worker.trainer.loop import train
from worker.trainer.plan import Stage
from worker.trainer.run import TrainingRun

WELL = {
    "loss": 0.5, "grad_norm": 1.0, "rewards/margins": 1.0, "rewards/accuracies": 0.8, "logps/chosen": -98.0,
    "logratios/chosen": 2.0, "logratios/rejected": -3.0,
}  # fmt: skip


def stage(*, steps: int = 40, settings: Any = None, longer_chosen: int = 30) -> Stage:
    """A stage with 60 validation pairs, of which `longer_chosen` have the longer answer as the chosen one."""
    rows = [make_row(k, 5, *((9, 4) if k < longer_chosen else (4, 9))) for k in range(60)]
    settings = settings or DPOHyperparameters(max_steps=steps)
    return Stage("dpo", settings, Rows.of(rows), Rows.of(rows), seed=0)


def hear(*entries: dict[str, float], of: Stage | None = None) -> list[tuple[int, str]]:
    """(number of the entry, code) of all that is said."""
    advisor = Advisor(of or stage())
    return [(number, advice.code) for number, entry in enumerate(entries) for advice in advisor.look(entry)]


def test_a_training_that_goes_well_is_left_alone() -> None:
    before = {"eval/loss": 0.69, "eval/logps/chosen": -100.0, "eval/logps/rejected": -100.0}
    validated = WELL | {
        "eval/loss": 0.5, "eval/logps/chosen": -97.0, "eval/logps/rejected": -104.0, "eval/rewards/longer_preferred": 0.6,
    }  # fmt: skip
    assert hear(before, *[WELL] * 30, validated) == []
    assert list(Advisor(stage()).before()) == []


@pytest.mark.parametrize(
    ("changed", "code", "first"),
    [
        ({"logratios/chosen": -8.0, "logratios/rejected": -20.0, "logps/chosen": -108.0}, "likelihood_displacement", 9),
        ({"rewards/margins": 10.5}, "margins_exploding", 9),
        ({"rewards/accuracies": 1.0}, "accuracy_saturated", 9),
        ({"grad_norm": 0.0}, "nothing_is_learned", 9),
    ],
)
def test_training_batches_of_a_while_are_spoken_of_once(changed: dict[str, float], code: str, first: int) -> None:
    assert hear(*[WELL | changed] * 30) == [(first, code)]


@pytest.mark.parametrize(
    "changed",
    [
        {"logratios/chosen": -4.0, "logratios/rejected": -20.0, "logps/chosen": -104.0},  # less than a twentieth
        {"logratios/chosen": -8.0, "logratios/rejected": 1.0, "logps/chosen": -108.0},  # only one side falls
        {"rewards/margins": 9.9},
        {"rewards/accuracies": 0.99},
    ],
)
def test_what_is_within_reason_is_not_spoken_of(changed: dict[str, float]) -> None:
    assert hear(*[WELL | changed] * 30) == []


def test_accuracy_that_is_saturated_at_the_end_is_no_waste() -> None:
    late = [WELL] * 31 + [WELL | {"rewards/accuracies": 1.0}] * 9
    assert hear(*late) == []


def test_validation_is_compared_with_what_it_was_before_the_first_step() -> None:
    before = {"eval/loss": 0.69, "eval/logps/chosen": -100.0, "eval/logps/rejected": -100.0}
    assert hear(before, WELL, WELL | {"eval/loss": 0.70}) == []
    assert hear(before, WELL, WELL | {"eval/loss": 0.72}, WELL | {"eval/loss": 0.9}) == [
        (2, "validation_worse_than_at_start")
    ]
    fallen = {"eval/logps/chosen": -106.0, "eval/logps/rejected": -130.0}
    assert hear(before, WELL | fallen) == [(1, "likelihood_displacement")], "on the same rows one look is enough"


def test_length_is_compared_with_what_people_preferred() -> None:
    longer = WELL | {"eval/rewards/longer_preferred": 0.9}
    assert hear(WELL, longer) == [(1, "length_drift")]
    assert hear(WELL, longer, of=stage(longer_chosen=50)) == [], "people preferred the longer one as often"


def test_an_sft_stage_has_no_sides() -> None:
    of = stage(settings=SupervisedHyperparameters(max_steps=40))
    assert hear(*[WELL | {"rewards/margins": 20.0, "grad_norm": 0.0}] * 20, of=of) == []
    assert hear({"eval/loss": 1.0}, WELL | {"eval/loss": 1.2}, of=of) == [(1, "validation_worse_than_at_start")]


def test_sides_that_are_the_same_after_truncation_are_named() -> None:
    row = make_row(1, 5, 4)
    same = Rows.of([make_row(0, 5, 4, 6), type(row)(1, row.prompt, (row.responses[0], row.responses[0]))])
    (advice,) = Advisor(Stage("dpo", DPOHyperparameters(), same, Rows.of([]), seed=0)).before()
    assert isinstance(advice, Advice) and advice.code == "identical_sides" and advice.figures["rows"] == 1.0


def warnings(events: list[Event]) -> list[tuple[str, int]]:
    return [(event["data"]["code"], event["data"]["step"]) for event in events
            if event["kind"] == "message" and event["data"]]  # fmt: skip


def test_a_run_says_it_and_one_that_is_resumed_does_not_say_it_again(llama: Path, tmp_path: Path) -> None:
    """A learning rate that is far too high does what the warnings are about."""
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

    class Watched(Events):
        def emit(self, event: TrainerEvent) -> None:
            super().emit(event)
            if isinstance(event, Metrics) and event.step == 15:
                stopping.set()

    with pytest.raises(Stopped):
        train(TrainingRun.of(stopped, Watched(stream), stopping))
    checkpoint = json.loads([line for line in stream.getvalue().splitlines() if '"checkpoint"' in line][-1])
    (stopped / checkpoint["path"]).rename(stopped / "resume")
    train(TrainingRun.of(stopped, Events(stream), threading.Event()))
    assert warnings(parse(stream)) == expected
