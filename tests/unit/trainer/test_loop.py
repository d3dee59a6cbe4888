"""Whole runs: their events, their outputs and their failures."""

import io
import json
import math
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.spec.hyperparameters import SupervisedHyperparameters
from tests.helpers.tiny_model import make_tiny_model
from tests.helpers.trainer import (
    dpo_method,
    make_pairs,
    make_row,
    make_work_folder,
    of_kind,
    parse,
    run_in_process,
    run_process,
    sft_method,
    training_metrics,
)
from worker.trainer.dataset import Rows
from worker.trainer.errors import Stopped, UserError
from worker.trainer.events import Events
from worker.trainer.loop import train
from worker.trainer.plan import Stage
from worker.trainer.run import TrainingRun

PAIRS = make_pairs(8)
PLAIN = {"adapter": {"r": 4}, "quantization": "none", "seed": 0, "validation_split": 0.0}
NO_SPLIT = {name: value for name, value in PLAIN.items() if name != "validation_split"}
Method = Callable[..., dict[str, Any]]


def weights_of(folder: Path) -> bytes:
    return (folder / "output" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_dpo_starts_at_ln_2_since_the_reference_is_the_policy_at_step_0(
    llama: Path, tmp_path: Path, quantization: str
) -> None:
    """This also holds after an SFT stage, when the policy is no longer the base."""
    spec = {
        **PLAIN,
        "quantization": quantization,
        "validation_split": 0.25,
        "sft": {"hyperparameters": {"max_steps": 3, "learning_rate": 0.01}},
        "method": dpo_method(max_steps=2, batch_size=8, learning_rate=0.001, warmup_ratio=0.0),
    }
    events = run_in_process(make_work_folder(tmp_path, llama, spec, train=PAIRS))
    before_sft, *_ = training_metrics(events, "eval/loss", "sft")
    after_sft = training_metrics(events, "eval/loss", "sft")[-1]
    assert after_sft < before_sft - 0.1
    assert training_metrics(events, "loss", "dpo")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert training_metrics(events, "eval/loss", "dpo")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert training_metrics(events, "rewards/margins", "dpo")[0] == pytest.approx(0, abs=1e-4)
    assert training_metrics(events, "gradient_weight", "dpo")[0] == pytest.approx(0.5, abs=1e-5)
    assert training_metrics(events, "loss", "dpo")[1] < math.log(2) - 1e-3


def test_training_on_swapped_pairs_reverses_the_preference(llama: Path, tmp_path: Path) -> None:
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in PAIRS]
    margins = []
    for name, pairs in (("as they are", PAIRS), ("swapped", swapped)):
        spec = {**NO_SPLIT, "validation_file": "validation.jsonl"}
        spec["method"] = dpo_method(max_steps=4, batch_size=8, learning_rate=0.003)
        folder = make_work_folder(tmp_path / name, llama, spec, train=pairs, validation=PAIRS)
        margins.append(training_metrics(run_in_process(folder), "eval/rewards/margins", "dpo")[-1])
    assert margins[0] > 0.1
    assert margins[1] < -0.1


def test_a_job_of_two_stages_equals_two_jobs_of_one_stage(llama: Path, tmp_path: Path) -> None:
    sft_settings = {"max_steps": 3, "learning_rate": 0.01}
    dpo = dpo_method(max_steps=3, batch_size=4, learning_rate=0.01)
    common = {**PLAIN, "adapter": {"r": 4, "dropout": 0.1}}
    both = {**common, "sft": {"hyperparameters": sft_settings}, "method": dpo}
    together = make_work_folder(tmp_path / "both", llama, both, train=PAIRS)
    run_in_process(together)

    first = make_work_folder(tmp_path / "sft", llama, {**common, "method": sft_method(**sft_settings)}, train=PAIRS)
    run_in_process(first)
    second = make_work_folder(tmp_path / "dpo", llama, {**common, "method": dpo}, train=PAIRS)
    (second / "start").symlink_to(first / "output", target_is_directory=True)
    run_in_process(second)
    assert weights_of(second) == weights_of(together) != weights_of(first)


def test_the_seed_determines_the_weights(llama: Path, tmp_path: Path) -> None:
    def trained_weights(name: str, seed: int) -> bytes:
        spec = {**PLAIN, "seed": seed, "adapter": {"r": 4, "dropout": 0.2}}
        spec["method"] = sft_method(max_steps=3, batch_size=3)
        folder = make_work_folder(tmp_path / name, llama, spec, train=PAIRS)
        run_in_process(folder)
        return weights_of(folder)

    assert trained_weights("one", 1) == trained_weights("again", 1)
    assert trained_weights("other", 2) != trained_weights("one more", 1)


def test_full_parameter_training_leaves_a_transformers_model(llama: Path, tmp_path: Path) -> None:
    spec = {**PLAIN, "adapter": "none", "method": sft_method(max_steps=4, batch_size=8, learning_rate=1e-3)}
    folder = make_work_folder(tmp_path, llama, spec, train=PAIRS)
    losses = training_metrics(run_in_process(folder), "loss")
    assert losses[-1] < losses[0]
    base = AutoModelForCausalLM.from_pretrained(llama)
    trained = AutoModelForCausalLM.from_pretrained(folder / "output")
    tokenizer = AutoTokenizer.from_pretrained(folder / "output")
    changed = [
        not torch.equal(before, after) for before, after in zip(base.parameters(), trained.parameters(), strict=True)
    ]
    assert all(changed)
    assert not (folder / "output" / "adapter_config.json").exists()
    text = PAIRS[0]["prompt"] + PAIRS[0]["chosen"] + "</s>"
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        assert trained(input_ids=ids, labels=ids).loss < base(input_ids=ids, labels=ids).loss


def test_the_events_describe_the_whole_run(llama: Path, tmp_path: Path) -> None:
    spec = {
        **PLAIN,
        "validation_split": 0.25,
        "sft": {"hyperparameters": {"n_epochs": 2, "batch_size": 3, "checkpoint_every": 2, "eval_every": 2}},
        "method": dpo_method(max_steps=3, batch_size=2, eval_every=3, checkpoint_every=2),
    }
    folder = make_work_folder(tmp_path, llama, spec, train=PAIRS)
    events = run_in_process(folder)

    assert [(event["stage"], event["rows"], event["validation_rows"]) for event in of_kind(events, "stage")] == [
        ("sft", 6, 2),
        ("dpo", 6, 2),
    ]
    metrics = of_kind(events, "metrics")
    # Step 0 of a stage is its validation before the first update.
    assert [(event["stage"], event["step"]) for event in metrics] == [
        *[("sft", step) for step in (0, 1, 2, 3, 4)],
        *[("dpo", step) for step in (4, 5, 6, 7)],
    ]
    assert {event["total_steps"] for event in metrics} == {7}
    validated = [(event["stage"], event["step"]) for event in metrics if "eval/loss" in event["metrics"]]
    assert validated == [("sft", 0), ("sft", 2), ("sft", 4), ("dpo", 4), ("dpo", 7)]
    assert metrics[0]["seconds_remaining"] is None
    assert all(event["seconds_remaining"] >= 0 for event in metrics if "loss" in event["metrics"])
    assert metrics[-1]["seconds_remaining"] == 0

    checkpoints = of_kind(events, "checkpoint")
    assert [(event["stage"], event["step"]) for event in checkpoints] == [
        ("sft", 2),
        ("sft", 4),
        ("dpo", 6),
        ("dpo", 7),
    ]
    last = folder / checkpoints[-1]["path"]
    assert (last / "model" / "adapter_model.safetensors").read_bytes() == weights_of(folder)

    assert events[-1]["kind"] == "done"
    tokenizer = AutoTokenizer.from_pretrained(llama)
    longest = max(len(tokenizer(pair["prompt"] + pair["chosen"]).input_ids) for pair in PAIRS)
    rows_trained = 4 * 3 + 3 * 2
    assert rows_trained < events[-1]["trained_tokens"] < rows_trained * 2 * longest
    assert events[-1]["metrics"]["loss"] == metrics[-1]["metrics"]["loss"]


def test_a_run_says_what_it_does_before_its_first_step(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts the rows that it tokenises and those of the reference pass."""
    monkeypatch.setattr("worker.trainer.events.WORKING_SECONDS", 0.0)
    spec = {**PLAIN, "sft": {"hyperparameters": {"max_steps": 1}}, "method": dpo_method(max_steps=1)}
    pairs = make_pairs(40)
    folder = make_work_folder(tmp_path, llama, spec, train=pairs)
    activities = [
        event["stage"] if event["kind"] == "stage" else (event["activity"], event["done"], event["total"])
        for event in run_in_process(folder)
        if event["kind"] in ("working", "stage")
    ]
    rows, began = len(pairs), activities.index("sft")
    assert activities[0] == ("tokenizing", 0, None) and ("tokenizing", rows, None) in activities[:began]
    assert activities[began - 1] == ("loading", None, None)
    reference = activities[began + 1 : activities.index("dpo")]
    assert reference[0] == ("reference", 0, rows) and reference[-1] == ("reference", rows, rows)
    assert activities[-1] == ("saving", None, None)


def test_the_same_activity_is_reported_once_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("worker.trainer.events.time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    events = Events(stream)
    events.working("tokenizing", 0)
    clock[0] += 0.9
    events.working("tokenizing", 1)
    events.working("reference", 0)
    clock[0] += 1.0
    events.working("reference", 5)
    shown = [(event["activity"], event["done"]) for event in parse(stream)]
    assert shown == [("tokenizing", 0), ("reference", 0), ("reference", 5)]


def test_a_trainer_does_not_begin_without_what_its_runner_has_placed(llama: Path, tmp_path: Path) -> None:
    folder = make_work_folder(tmp_path, llama, {**PLAIN, "method": sft_method(max_steps=1)}, train=PAIRS)
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"placed": ["base", "start", "resume"]}))
    status, events = run_process(folder)
    assert status == 1
    assert [(event["kind"], event.get("reason")) for event in events] == [
        ("broken", "FileNotFoundError: the work folder has lost start, resume")
    ]


def test_trained_tokens_count_a_shared_prompt_once(llama: Path, tmp_path: Path) -> None:
    spec = {**PLAIN, "method": dpo_method(n_epochs=2, batch_size=8)}
    (done,) = of_kind(run_in_process(make_work_folder(tmp_path, llama, spec, train=PAIRS)), "done")
    tokenizer = AutoTokenizer.from_pretrained(llama)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    tokens_of_an_epoch = sum(
        1 + count(pair["prompt"]) + count(pair["chosen"]) + 1 + count(pair["rejected"]) + 1 for pair in PAIRS
    )
    assert done["trained_tokens"] == 2 * tokens_of_an_epoch


def test_a_run_told_to_stop_before_its_first_step_stops_without_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    folder = make_work_folder(tmp_path, llama, {**PLAIN, "method": sft_method()}, train=PAIRS)
    stopping, stream = threading.Event(), io.StringIO()
    stopping.set()
    with pytest.raises(Stopped):
        train(TrainingRun.of(folder, Events(stream), stopping))
    assert of_kind(parse(stream), "checkpoint") == []
    assert not (folder / "output").exists()


# -- which rows, which rate ------------------------------------------------------------------------------------


def make_stage(row_count: int, seed: int = 0, **hyperparameters: Any) -> Stage:
    resolved = SupervisedHyperparameters(**hyperparameters).resolved(full=False)
    return Stage("sft", resolved, Rows.of(make_row(line, 1, 1) for line in range(row_count)), Rows.of([]), seed)


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=80)
def test_batches_are_full_and_every_row_is_seen_in_every_epoch(
    row_count: int, batch_size: int, n_epochs: int, seed: int
) -> None:
    stage = make_stage(row_count, seed, batch_size=batch_size, n_epochs=n_epochs)
    batches = [stage.batch(step) for step in range(stage.steps)]
    assert {len(batch) for batch in batches} == {min(batch_size, row_count)}
    drawn = [number for batch in batches for number in batch]
    assert len(drawn) - row_count * n_epochs in range(stage.batch_size)  # no step more than it takes
    for epoch in range(n_epochs):
        assert sorted(drawn[epoch * row_count : (epoch + 1) * row_count]) == list(range(row_count))
    assert batches == [make_stage(row_count, seed, batch_size=batch_size).batch(step) for step in range(stage.steps)]


def test_each_epoch_and_each_seed_has_an_order_of_its_own() -> None:
    first, second = make_stage(30, batch_size=30).batch(0), make_stage(30, batch_size=30).batch(1)
    other = make_stage(30, seed=1, batch_size=30).batch(0)
    assert len({tuple(order) for order in (first, second, other, range(30))}) == 4


def test_max_steps_continues_into_further_epochs() -> None:
    stage = make_stage(3, batch_size=2, max_steps=6)
    assert stage.steps == 6
    assert Counter(number for step in range(6) for number in stage.batch(step)) == {0: 4, 1: 4, 2: 4}


@pytest.mark.parametrize(
    ("scheduler", "halfway", "end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_the_learning_rate_warms_up_and_decays(scheduler: str, halfway: float, end: float) -> None:
    stage = make_stage(
        1, max_steps=110, warmup_ratio=10 / 110, learning_rate=0.2, learning_rate_multiplier=3.0, lr_scheduler=scheduler
    )
    peak = 0.6
    rates = [stage.learning_rate(step) for step in range(111)]
    assert rates[:10] == pytest.approx([peak * (step + 1) / 11 for step in range(10)])
    assert rates[10] == pytest.approx(peak)
    assert rates[60] == pytest.approx(peak * halfway)
    assert rates[110] == pytest.approx(peak * end)
    assert rates[109] > 0
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_each_step_uses_the_learning_rate_of_the_schedule(llama: Path, tmp_path: Path) -> None:
    method = sft_method(max_steps=5, batch_size=2, learning_rate=0.1, warmup_ratio=0.4)
    events = run_in_process(make_work_folder(tmp_path, llama, {**PLAIN, "method": method}, train=PAIRS))
    expected = [0.1 / 3, 0.2 / 3, 0.1, 0.1 * 0.75, 0.1 * 0.25]  # two steps of warm-up, then (1 + cos) / 2
    assert training_metrics(events, "learning_rate") == pytest.approx(expected)


# -- failures --------------------------------------------------------------------------------------------------


def explosive(method: Method, eval_every: int = 4) -> dict[str, Any]:
    return method(max_steps=4, batch_size=8, eval_every=eval_every, learning_rate=1.0, learning_rate_multiplier=1e30)


def test_a_loss_that_is_not_finite_fails_the_job_with_its_code(llama: Path, tmp_path: Path) -> None:
    folder = make_work_folder(tmp_path, llama, {**PLAIN, "method": explosive(dpo_method)}, train=PAIRS)
    status, events = run_process(folder)
    assert status == 1
    assert events[-1]["kind"] == "failed"
    assert events[-1]["code"] == "loss_not_finite"
    assert events[-1]["param"] == "method"
    assert "learning rate" in events[-1]["message"]
    assert not (folder / "output").exists()


@pytest.mark.parametrize("method", [sft_method, dpo_method], ids=["sft", "dpo"])
def test_a_validation_loss_that_is_not_finite_fails_the_job_with_its_code(
    llama: Path, tmp_path: Path, method: Method
) -> None:
    spec = {**PLAIN, "validation_split": 0.25, "method": explosive(method, eval_every=1)}
    with pytest.raises(UserError) as caught:
        run_in_process(make_work_folder(tmp_path, llama, spec, train=PAIRS))
    assert caught.value.code == "loss_not_finite"


def test_a_base_model_with_a_nan_weight_fails_the_job_with_loss_not_finite(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "broken")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    folder = make_work_folder(tmp_path / "work", model, {**PLAIN, "method": sft_method()}, train=PAIRS)
    with pytest.raises(UserError) as caught:
        run_in_process(folder)
    assert caught.value.code == "loss_not_finite"


def test_target_modules_that_match_nothing_fail_the_job_and_are_named(llama: Path, tmp_path: Path) -> None:
    spec = {**PLAIN, "adapter": {"target_modules": ["no_such_layer"]}, "method": sft_method()}
    status, events = run_process(make_work_folder(tmp_path, llama, spec, train=PAIRS))
    assert status == 1
    assert events[-1]["kind"] == "failed"
    assert events[-1]["param"] == "adapter.target_modules"
    assert "no_such_layer" in events[-1]["message"]


def test_target_modules_that_match_only_embeddings_or_norms_fail_too(llama: Path, tmp_path: Path) -> None:
    spec = {**PLAIN, "adapter": {"target_modules": ["input_layernorm"]}, "method": sft_method()}
    with pytest.raises(UserError) as caught:
        run_in_process(make_work_folder(tmp_path, llama, spec, train=PAIRS))
    assert caught.value.param == "adapter.target_modules"


def test_rows_without_anything_to_learn_fail_the_job(llama: Path, tmp_path: Path) -> None:
    spec = {**PLAIN, "method": sft_method()}
    folder = make_work_folder(tmp_path, llama, spec, train=[{"prompt": "see", "completion": " "}])
    with pytest.raises(UserError) as caught:
        run_in_process(folder)
    assert (caught.value.code, caught.value.param) == ("no_training_rows", "training_file")


def test_a_folder_that_holds_no_model_fails_the_job(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    folder = make_work_folder(tmp_path / "work", tmp_path / "nothing", {**PLAIN, "method": sft_method()}, train=PAIRS)
    with pytest.raises(UserError) as caught:
        run_in_process(folder)
    assert (caught.value.code, caught.value.param) == ("model_not_loadable", "model")


def test_truncated_prompts_are_reported(llama: Path, tmp_path: Path) -> None:
    long = [{"prompt": "the cat and the dog " * 20, "completion": " slept."}]
    spec = {**PLAIN, "method": sft_method(max_length=16, batch_size=1)}
    events = run_in_process(make_work_folder(tmp_path, llama, spec, train=long))
    (warning,) = [event for event in of_kind(events, "message") if event["level"] == "warn"]
    assert "16" in warning["message"]
    assert "1 prompts" in warning["message"]
