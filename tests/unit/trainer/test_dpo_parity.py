"""DPO, compared with TRL's DPOTrainer on the same texts."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from app.spec.datasets.example import Example, Kind
from app.spec.hyperparameters import DPOHyperparameters
from tests.helpers.trainer import (
    disturb,
    dpo_method,
    load,
    make_pairs,
    make_run,
    make_work_folder,
    run_in_process,
    training_metrics,
)
from tests.helpers.versions import needs_transformers
from worker.trainer import reference
from worker.trainer.averages import Averages
from worker.trainer.data import Recipe, Row, Tally, rows
from worker.trainer.dataset import Rows
from worker.trainer.launcher import Launcher
from worker.trainer.loop import stages_of
from worker.trainer.methods.preference import Preference
from worker.trainer.model import Policy
from worker.trainer.reference import Reference, References

pytestmark = needs_transformers("5.23", "TRL does not run with it")
PAIRS = make_pairs(6)
BETA = 0.3


CURVE: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "logging_steps": 1,
    "disable_tqdm": True,
}
"""A constant learning rate, and the loss of every step."""


def trl_config(folder: Path, **settings: Any) -> DPOConfig:
    """TRL's own settings, on the CPU and in single precision."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "beta": BETA,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "per_device_train_batch_size": len(PAIRS),
        "dataloader_pin_memory": False,
    }
    return DPOConfig(**defaults | settings)


def make_trl_trainer(policy: Path, reference: Path, folder: Path, **settings: Any) -> Any:
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
        args=trl_config(folder, **settings),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(reference),
    )


@dataclass
class Parity:
    """The same policy, reference and pairs in both engines."""

    policy: Policy
    rows: Rows
    reference: Reference
    trl: Any
    batch: dict[str, Tensor]


@pytest.fixture(scope="module")
def parity(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Parity:
    policy = load(llama, adapter="none")
    examples = [Example(line, pair["prompt"], (pair["chosen"], pair["rejected"])) for line, pair in enumerate(PAIRS, 1)]
    token_rows = Rows.of(rows(examples, policy.tokenizer, Recipe(Kind.PREFERENCE, 512), Tally()))
    reference_at_start = reference.compute(Launcher(policy), token_rows)
    disturb(policy, scale=0.02)
    policy_folder = tmp_path_factory.mktemp("moved")
    policy.save(policy_folder)
    trl = make_trl_trainer(policy_folder, llama, tmp_path_factory.mktemp("trl"))
    batch = trl.data_collator([trl.train_dataset[i] for i in range(len(PAIRS))])
    return Parity(policy, token_rows, reference_at_start, trl, batch)


def our_gradients(parity: Parity, averages: Averages) -> dict[str, Tensor]:
    """The gradient of a step over all pairs. Its metrics, including the loss, are added to `averages`."""
    settings = DPOHyperparameters(beta=BETA).resolved(full=True)
    empty = Reference(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    references = References(parity.reference, empty)
    method = Preference(Launcher(parity.policy), settings, parity.rows, Rows.of([]))
    method.references, numbers = references, list(range(len(parity.rows)))
    method.gradient(numbers, averages)
    gradients = {
        name: parameter.grad for name, parameter in parity.policy.trainable().items() if parameter.grad is not None
    }
    parity.policy.model.zero_grad(set_to_none=True)
    return gradients


def test_the_tokens_equal_trls(parity: Parity) -> None:
    count = len(PAIRS)
    for number, row in enumerate(parity.rows):
        for k, response in enumerate(row.responses):
            length = int(parity.batch["attention_mask"][k * count + number].sum())
            ids = parity.batch["input_ids"][k * count + number, :length].tolist()
            answer = parity.batch["completion_mask"][k * count + number, :length].tolist()
            assert ids == list(row.prompt + response.ids)
            assert answer == [0] * len(row.prompt) + [1] * len(response.ids)


def test_the_log_probs_of_reference_and_policy_equal_trls(parity: Parity) -> None:
    their_reference = torch.stack(parity.trl.compute_ref_log_probs(parity.trl.ref_model, parity.batch), dim=1)
    torch.testing.assert_close(parity.reference.logps.view(-1, 2), their_reference, rtol=1e-5, atol=0)
    their_policy = torch.stack(parity.trl.compute_ref_log_probs(parity.trl.model, parity.batch), dim=1)
    ours = reference.compute(Launcher(parity.policy), parity.rows)
    torch.testing.assert_close(ours.logps.view(-1, 2), their_policy, rtol=1e-5, atol=0)
    assert not torch.allclose(their_reference, their_policy, rtol=1e-2)


def test_the_loss_its_gradient_and_its_metrics_equal_trls(parity: Parity) -> None:
    averages = Averages()
    ours = our_gradients(parity, averages)
    loss = averages.means()["loss"]
    parity.trl.model.train()
    their_loss = parity.trl.compute_loss(parity.trl.model, parity.batch)
    assert loss == pytest.approx(their_loss.item(), rel=1e-5)
    assert abs(loss - math.log(2)) > 0.01  # the policy has left its reference

    their_loss.backward()
    theirs = {name: parameter.grad for name, parameter in parity.trl.model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=1e-5 * gradient.abs().max().item(), msg=name)

    means = averages.means()
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert means[name] == pytest.approx(parity.trl._metrics["train"][name][-1], rel=1e-4), name
    for name in ("logps/chosen", "logps/rejected"):
        assert means[name] == pytest.approx(parity.trl._metrics["train"][name][-1], rel=1e-5), name


def test_the_loss_curve_equals_trls(llama: Path, tmp_path: Path) -> None:
    """Each step uses all pairs at once, so their order does not matter."""
    steps, rate = 50, 1e-5
    trl = make_trl_trainer(
        llama,
        llama,
        tmp_path / "trl",
        max_steps=steps,
        learning_rate=rate,
        **CURVE,
    )
    trl.train()
    theirs = [entry["loss"] for entry in trl.state.log_history if "loss" in entry]

    method = dpo_method(
        beta=BETA,
        batch_size=len(PAIRS),
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler="constant",
        warmup_ratio=0.0,
    )
    spec = {"method": method, "adapter": "none", "quantization": "none", "seed": 0, "validation_split": 0.0}
    folder = make_work_folder(tmp_path / "ours", llama, spec, train=PAIRS)
    ours = training_metrics(run_in_process(folder), "loss", "dpo")

    assert len(ours) == steps
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < 0.5 * ours[0]


def test_the_loss_curve_of_an_adapter_equals_trls_batch_by_batch(llama: Path, tmp_path: Path) -> None:
    """Fifty steps of LoRA in single precision. Both start from the same adapter and take the rows in our order."""
    steps, size, rate = 50, 2, 2e-3
    start = tmp_path / "start"
    load(llama).save(start)
    method = dpo_method(
        beta=BETA, batch_size=size, max_steps=steps, learning_rate=rate, lr_scheduler="constant", warmup_ratio=0.0
    )
    spec = {"method": method, "adapter": {"r": 4}, "quantization": "none", "seed": 0, "validation_split": 0.0}
    folder = make_work_folder(tmp_path / "ours", llama, spec, train=PAIRS)
    (folder / "start").symlink_to(start, target_is_directory=True)
    (stage,) = stages_of(make_run(folder))
    order = [number for step in range(steps) for number in stage.batch(step)]
    ours = training_metrics(run_in_process(folder), "loss", "dpo")

    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    trl = DPOTrainer(
        model=PeftModel.from_pretrained(base, start, is_trainable=True),
        args=trl_config(
            tmp_path / "trl",
            per_device_train_batch_size=size,
            train_sampling_strategy="sequential",
            num_train_epochs=1,
            learning_rate=rate,
            **CURVE,
        ),
        train_dataset=Dataset.from_list([PAIRS[number] for number in order]),
        processing_class=AutoTokenizer.from_pretrained(llama),
    )
    trl.train()
    theirs = [entry["loss"] for entry in trl.state.log_history if "loss" in entry]
    assert len(ours) == len(theirs) == steps
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert min(ours) < 0.5 * ours[0]


def test_swapping_the_answers_changes_the_sign_of_the_margins(parity: Parity) -> None:
    averages, swapped_averages = Averages(), Averages()
    our_gradients(parity, averages)
    swapped_rows = Rows.of(Row(row.line, row.prompt, row.responses[::-1]) for row in parity.rows)
    swapped_logps = parity.reference.logps.view(-1, 2).flip(1).flatten()
    swapped_reference = Reference(swapped_logps, parity.reference.first, swapped_logps)
    our_gradients(Parity(parity.policy, swapped_rows, swapped_reference, parity.trl, parity.batch), swapped_averages)
    means, swapped_means = averages.means(), swapped_averages.means()
    assert means["rewards/margins"] == pytest.approx(-swapped_means["rewards/margins"], rel=1e-4)
    assert abs(means["rewards/margins"]) > 0.01
    assert means["rewards/chosen"] == pytest.approx(swapped_means["rewards/rejected"], rel=1e-4)
    assert means["rewards/accuracies"] == pytest.approx(1 - swapped_means["rewards/accuracies"])
    assert means["gradient_weight"] == pytest.approx(1 - swapped_means["gradient_weight"], rel=1e-4)
