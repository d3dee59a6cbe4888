"""A run that is stopped and resumed equals, to the bit, a run that is not."""

import io
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.trainer import (
    TIME_DEPENDENT,
    Event,
    TrainerProcess,
    dpo_method,
    make_pairs,
    make_run,
    make_work_folder,
    of_kind,
    parse,
    read_csv,
    run_in_process,
    run_process,
    sft_method,
)
from worker.trainer.errors import Stopped
from worker.trainer.loop import train
from worker.trainer.methods.preference import Preference

STOPPED = 75
STEPS = 6
"""Steps of each stage."""
SETTINGS = {"max_steps": STEPS, "batch_size": 3, "checkpoint_every": 2, "eval_every": 3, "learning_rate": 0.005}
SPEC: dict[str, Any] = {
    "sft": {"hyperparameters": SETTINGS},
    "method": dpo_method(**SETTINGS),
    "adapter": {"r": 4, "dropout": 0.1},
    "quantization": "nf4",
    "seed": 11,
    "validation_split": 0.2,
}
PLAIN_SPEC = {"adapter": {"r": 4}, "quantization": "none", "seed": 11, "validation_split": 0.2}
PAIRS = make_pairs(10)


@pytest.fixture(scope="module")
def uninterrupted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """(work folder, events)"""
    folder = make_work_folder(tmp_path_factory.mktemp("uninterrupted"), llama, SPEC, train=PAIRS)
    status, events = run_process(folder)
    assert status == 0
    return folder, events


def run_until(folder: Path, step: int) -> list[Event]:
    """Run, stop the process at the metrics of step `step`, and return all its events."""
    events: list[Event] = []
    with TrainerProcess(folder) as process:
        for event in process.events():
            events.append(event)
            if event["kind"] == "metrics" and event["step"] == step:
                process.terminate()
        assert process.status() == STOPPED, process.log()
    return events


def comparable(event: Event) -> dict[str, Any]:
    metrics = {name: value for name, value in event["metrics"].items() if name not in TIME_DEPENDENT}
    return {"stage": event["stage"], "step": event["step"], "total_steps": event["total_steps"], **metrics}


def timeless_rows(path: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name not in TIME_DEPENDENT} for row in read_csv(path)]


@pytest.mark.parametrize(("stage", "stop_at"), [("sft", 1), ("dpo", STEPS + 3)])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(
    uninterrupted: tuple[Path, list[Event]], llama: Path, tmp_path: Path, stage: str, stop_at: int
) -> None:
    expected_folder, expected_events = uninterrupted
    folder = make_work_folder(tmp_path, llama, SPEC, train=PAIRS)
    before = run_until(folder, stop_at)
    last = of_kind(before, "checkpoint")[-1]
    assert last["stage"] == stage
    assert stop_at <= last["step"] < 2 * STEPS
    assert not (folder / "output").exists()
    shutil.move(folder / last["path"], folder / "resume")
    assert not list(folder.rglob("*.pt")) + list(folder.rglob("*.bin")) + list(folder.rglob("*.pkl"))

    status, after = run_process(folder)
    assert status == 0, after[-1]
    metrics = [comparable(event) for event in of_kind(before, "metrics") if event["step"] <= last["step"]]
    metrics += [comparable(event) for event in of_kind(after, "metrics")]
    assert metrics == [comparable(event) for event in of_kind(expected_events, "metrics")]
    assert after[-1]["kind"] == "done"
    assert after[-1]["trained_tokens"] == expected_events[-1]["trained_tokens"]

    output, expected_output = folder / "output", expected_folder / "output"
    for name in ("adapter_model.safetensors", "validation_logps.jsonl", "spec.json"):
        assert (output / name).read_bytes() == (expected_output / name).read_bytes(), name
    assert timeless_rows(output / "metrics.csv") == timeless_rows(expected_output / "metrics.csv")
    assert (folder / "result.csv").read_bytes() == (expected_folder / "result.csv").read_bytes()


@pytest.mark.parametrize(("finished", "remaining_steps"), [("sft", [6, 7, 8, 9, 10, 11, 12]), ("dpo", [])])
def test_a_run_stopped_between_two_stages_or_after_the_last_resumes(
    llama: Path, tmp_path: Path, finished: str, remaining_steps: list[int]
) -> None:
    """After the last checkpoint of a stage, nothing of it is left to do. All parameters train here."""
    hyperparameters = {**SETTINGS, "learning_rate": 1e-4, "checkpoint_every": STEPS}
    spec = {
        **SPEC,
        "sft": {"hyperparameters": hyperparameters},
        "method": dpo_method(**hyperparameters),
        "adapter": "none",
        "quantization": "none",
    }
    first = make_work_folder(tmp_path / "first", llama, spec, train=PAIRS)
    checkpoints = {event["stage"]: event["path"] for event in of_kind(run_in_process(first), "checkpoint")}

    second = make_work_folder(tmp_path / "second", llama, spec, train=PAIRS)
    shutil.copytree(first / checkpoints[finished], second / "resume")
    resumed = run_in_process(second)
    assert [event["step"] for event in of_kind(resumed, "metrics")] == remaining_steps
    for name in ("model.safetensors", "validation_logps.jsonl"):
        assert (second / "output" / name).read_bytes() == (first / "output" / name).read_bytes(), name
    assert timeless_rows(second / "output" / "metrics.csv") == timeless_rows(first / "output" / "metrics.csv")


def test_the_process_ends_by_itself_when_its_standard_input_is_closed(llama: Path, tmp_path: Path) -> None:
    spec = {**SPEC, "sft": None, "method": sft_method(max_steps=3000, batch_size=3)}
    with TrainerProcess(make_work_folder(tmp_path, llama, spec, train=PAIRS)) as process:
        closed = False
        for event in process.events():
            if event["kind"] == "metrics" and not closed:
                process.close_stdin()
                closed = True
        assert closed
        assert process.status() == STOPPED
    assert not (tmp_path / "output").exists()


# -- at any step ------------------------------------------------------------------------------------------------

POINTS = 20
LONG = {**SETTINGS, "max_steps": 12, "checkpoint_every": 1, "eval_every": 5}
EVERYTHING: dict[str, Any] = {
    **SPEC,
    "sft": {"hyperparameters": {**LONG, "early_stopping": {"patience": 3, "metric": "eval/loss"}}},
    "method": dpo_method(
        **LONG, loss="bco_pair", sync_reference={"steps": 4, "alpha": 0.5}, early_stopping={"patience": 9}
    ),
}


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event], dict[int, Path]]:
    """(work folder of a run with a checkpoint at every step, its events, the checkpoints by step)"""
    folder = make_work_folder(tmp_path_factory.mktemp("whole"), llama, EVERYTHING, train=PAIRS)
    events = run_in_process(folder)
    checkpoints = {event["step"]: folder / event["path"] for event in of_kind(events, "checkpoint")}
    assert len(checkpoints) >= POINTS
    return folder, events, checkpoints


@pytest.mark.parametrize("point", random.Random(0).sample(range(24), POINTS))
def test_a_run_resumed_at_any_step_has_the_same_bytes(
    whole: tuple[Path, list[Event], dict[int, Path]], llama: Path, tmp_path: Path, point: int
) -> None:
    """With dropout, early stopping, a moving reference, and a loss that couples the batch.

    Half of the runs find the tokens and the reference in the cache.
    """
    expected, events, checkpoints = whole
    step = sorted(checkpoints)[point % len(checkpoints)]
    folder = make_work_folder(tmp_path / "work", llama, EVERYTHING, train=PAIRS)
    shutil.copytree(checkpoints[step], folder / "resume")
    if point % 2:
        shutil.copytree(expected / "cache", folder / "cache")
    resumed = run_in_process(folder)
    metrics = [comparable(event) for event in of_kind(resumed, "metrics")]
    position = next(k for k, event in enumerate(events) if event["kind"] == "checkpoint" and event["step"] == step)
    assert metrics == [comparable(event) for event in of_kind(events[position:], "metrics")]
    for name in ("adapter_model.safetensors", "validation_logps.jsonl"):
        assert (folder / "output" / name).read_bytes() == (expected / "output" / name).read_bytes(), name
    assert timeless_rows(folder / "output" / "metrics.csv") == timeless_rows(expected / "output" / "metrics.csv")


def test_a_stop_in_the_middle_of_a_validation_loses_no_step(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {**PLAIN_SPEC, "method": dpo_method(**SETTINGS)}
    whole = make_work_folder(tmp_path / "whole", llama, spec, train=PAIRS)
    run_in_process(whole)
    folder, stream = make_work_folder(tmp_path / "stopped", llama, spec, train=PAIRS), io.StringIO()
    run, validate, calls = make_run(folder, stream), Preference.validate, Counter[str]()

    def stopping(method: Preference, *arguments: Any) -> Any:
        calls["validations"] += 1
        if calls["validations"] == 2:  # the first is before the first step; this one is after the third
            run.stopping.set()
        return validate(method, *arguments)

    monkeypatch.setattr(Preference, "validate", stopping)
    with pytest.raises(Stopped):
        train(run)
    last = of_kind(parse(stream), "checkpoint")[-1]
    assert last["step"] == 3
    monkeypatch.undo()
    shutil.move(folder / last["path"], folder / "resume")
    metrics = of_kind(run_in_process(folder), "metrics")
    assert metrics[0]["step"] == 3 and "eval/loss" in metrics[0]["metrics"] and "loss" in metrics[0]["metrics"]
    for name in ("adapter_model.safetensors", "validation_logps.jsonl"):
        assert (folder / "output" / name).read_bytes() == (whole / "output" / name).read_bytes(), name
    assert timeless_rows(folder / "output" / "metrics.csv") == timeless_rows(whole / "output" / "metrics.csv")


def test_a_warm_cache_changes_no_bit(uninterrupted: tuple[Path, list[Event]], llama: Path, tmp_path: Path) -> None:
    expected, _ = uninterrupted
    folder = make_work_folder(tmp_path, llama, SPEC, train=PAIRS)
    shutil.copytree(expected / "cache", folder / "cache")
    events = run_in_process(folder)
    assert of_kind(events, "made") == []
    output = "output/adapter_model.safetensors"
    assert (folder / output).read_bytes() == (expected / output).read_bytes()
