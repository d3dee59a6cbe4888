"""SFT: its loss equals that of transformers in any packing, and only SFT has dropout."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.trainer import (
    Record,
    disturb,
    dpo_method,
    make_pairs,
    make_run,
    make_work_folder,
    of_kind,
    run_in_process,
    sft_method,
    training_metrics,
)
from worker.trainer.checkpoint import State
from worker.trainer.loading import load_policy
from worker.trainer.loop import stages_of
from worker.trainer.stage_run import begin

PAIRS = make_pairs(10)
ANSWERS: list[Record] = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
PLAIN = {"adapter": {"r": 4}, "quantization": "none", "seed": 0, "validation_split": 0.0}


def cross_entropy(model: Path, records: list[Record], *, on_text: bool = False) -> float:
    """transformers' own loss of the answers (or of everything), all records in one padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids, labels = [], []
    for record in records:
        answer = record["completion"] if "completion" in record else record["chosen"]
        encoded = tokenizer(record["prompt"] + answer + tokenizer.eos_token, return_offsets_mapping=True)
        ends = [end for _, end in encoded.offset_mapping]
        ids.append(torch.tensor(encoded.input_ids))
        scored = [on_text or end > len(record["prompt"]) for end in ends]
        labels.append(
            torch.tensor([token if flag else -100 for token, flag in zip(encoded.input_ids, scored, strict=True)])
        )

    def padded(rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    mask = padded([torch.ones_like(row) for row in ids], 0)
    with torch.no_grad():
        loss = causal(input_ids=padded(ids, 0), attention_mask=mask, labels=padded(labels, -100)).loss
    return float(loss)


def first_validation(folder: Path) -> dict[str, float]:
    """The metrics that a job reports before its first step."""
    first = of_kind(run_in_process(folder), "metrics")[0]
    assert first["step"] == 0
    metrics: dict[str, float] = first["metrics"]
    return metrics


@pytest.mark.parametrize("loss_on", ["answers", "text"])
def test_a_fresh_jobs_validation_loss_equals_transformers_cross_entropy(
    llama: Path, tmp_path: Path, loss_on: str
) -> None:
    spec = {**PLAIN, "validation_file": "validation.jsonl", "method": sft_method(max_steps=1, loss_on=loss_on)}
    del spec["validation_split"]
    folder = make_work_folder(tmp_path, llama, spec, train=ANSWERS[:4], validation=ANSWERS)
    expected = cross_entropy(llama, ANSWERS, on_text=loss_on == "text")
    assert first_validation(folder)["eval/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss_on", ["answers", "text"])
def test_sft_on_pairs_learns_the_preferred_answers(llama: Path, tmp_path: Path, loss_on: str) -> None:
    spec = {**PLAIN, "validation_file": "validation.jsonl", "method": sft_method(max_steps=1, loss_on=loss_on)}
    del spec["validation_split"]
    folder = make_work_folder(tmp_path, llama, spec, train=PAIRS[:4], validation=PAIRS)
    expected = cross_entropy(llama, PAIRS, on_text=loss_on == "text")
    assert first_validation(folder)["eval/loss"] == pytest.approx(expected, rel=1e-5)


def test_a_batch_of_raw_text_with_nothing_to_predict_does_not_stop_the_job(llama: Path, tmp_path: Path) -> None:
    """17 tokens in pieces of 16: the last piece is one token, which nothing predicts."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    text = "cat" + " cat" * 14
    assert len(tokenizer(text + tokenizer.eos_token).input_ids) == 17
    spec = {**PLAIN, "method": sft_method(batch_size=1, n_epochs=1, max_length=16)}
    events = run_in_process(make_work_folder(tmp_path, llama, spec, train=[{"text": text}]))
    assert of_kind(events, "done")


def test_packed_rows_have_the_loss_and_the_gradient_of_rows_one_by_one(llama: Path, tmp_path: Path) -> None:
    """A step of plain gradient descent, whose update is the gradient itself."""
    spec = {**PLAIN, "method": sft_method(batch_size=len(ANSWERS), max_grad_norm=1e9, warmup_ratio=0.0)}
    folder = make_work_folder(tmp_path, llama, spec, train=ANSWERS)
    outcomes = []
    for budget, packs in ((100_000, 1), (1, len(ANSWERS))):
        run = make_run(folder)
        policy = disturb(load_policy(run.spec, run.base, None, run.events))
        policy.packing = replace(policy.packing, budget=budget, segment_tokens=budget)
        (stage,) = stages_of(run)
        assert len(list(policy.packs(stage.train, list(range(len(ANSWERS)))))) == packs
        before = {name: parameter.detach().clone() for name, parameter in policy.trainable().items()}
        stage_run = begin(run, stage, policy, State(stage.name), stage.steps)
        stage_run.optimizer = torch.optim.SGD(policy.trainable().values())
        metrics = stage_run.step()
        rate = metrics["learning_rate"]
        gradient_of_step = {
            name: (before[name] - parameter.detach()) / rate for name, parameter in policy.trainable().items()
        }
        outcomes.append((metrics, gradient_of_step))
    (packed, packed_gradient), (single, single_gradient) = outcomes
    assert packed["loss"] == pytest.approx(single["loss"], rel=1e-6)
    assert packed["mean_token_accuracy"] == single["mean_token_accuracy"]
    assert packed["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-5)
    norm = torch.cat([gradient.flatten() for gradient in single_gradient.values()]).norm().item()
    assert norm == pytest.approx(single["grad_norm"], rel=1e-2)
    for name, gradient in single_gradient.items():
        torch.testing.assert_close(packed_gradient[name], gradient, rtol=0, atol=1e-3 * norm, msg=name)


def test_the_loss_of_a_step_is_the_mean_over_its_tokens_not_over_its_rows(llama: Path, tmp_path: Path) -> None:
    spec = {**PLAIN, "method": sft_method(batch_size=len(ANSWERS), max_steps=1)}
    events = run_in_process(make_work_folder(tmp_path, llama, spec, train=ANSWERS))
    (loss,) = training_metrics(events, "loss")
    assert loss == pytest.approx(cross_entropy(llama, ANSWERS), rel=1e-5)
    by_row = [cross_entropy(llama, [record]) for record in ANSWERS]
    assert abs(sum(by_row) / len(by_row) - loss) > 1e-3


def test_two_rows_that_are_the_same_count_twice(llama: Path, tmp_path: Path) -> None:
    records = [ANSWERS[0], ANSWERS[0], ANSWERS[1]]
    spec = {**PLAIN, "method": sft_method(batch_size=3, max_steps=1)}
    (loss,) = training_metrics(run_in_process(make_work_folder(tmp_path, llama, spec, train=records)), "loss")
    assert loss == pytest.approx(cross_entropy(llama, records), rel=1e-5)
    assert abs(loss - cross_entropy(llama, records[1:])) > 1e-3


def adapter_after(folder: Path) -> dict[str, Tensor]:
    run_in_process(folder)
    return load_file(folder / "output" / "adapter_model.safetensors")


@pytest.mark.parametrize(("method", "acts"), [(sft_method, True), (dpo_method, False)], ids=["sft", "dpo"])
def test_dropout_acts_in_sft_only(
    llama: Path, tmp_path: Path, method: Callable[..., dict[str, object]], acts: bool
) -> None:
    results = []
    for dropout in (0.0, 0.5):
        spec = {**PLAIN, "adapter": {"r": 4, "dropout": dropout}, "method": method(max_steps=3, learning_rate=0.01)}
        results.append(adapter_after(make_work_folder(tmp_path / str(dropout), llama, spec, train=PAIRS)))
    without_dropout, with_dropout = results
    same = [torch.equal(without_dropout[name], with_dropout[name]) for name in without_dropout]
    assert not any(same) if acts else all(same)


def test_sft_makes_the_answers_likelier(llama: Path, tmp_path: Path) -> None:
    spec = {**PLAIN, "method": sft_method(batch_size=5, n_epochs=10, learning_rate=0.01)}
    events = run_in_process(make_work_folder(tmp_path, llama, spec, train=ANSWERS))
    losses = training_metrics(events, "loss")
    assert len(losses) == 20
    assert losses[-1] < 0.5 * losses[0]
