"""Full-parameter training of a model that is divided among ranks: the same to rounding as on one rank."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from app.spec.hyperparameters import SupervisedHyperparameters
from tests.helpers.ranks import PAIRS, STEPS
from tests.helpers.trainer import Event, TrainerProcess, dpo_method, load, make_work_folder, of_kind, run_process
from worker.trainer import checkpoint
from worker.trainer.dataset import Rows
from worker.trainer.fully_sharded import Root
from worker.trainer.launcher import Launcher
from worker.trainer.methods.supervised import Supervised
from worker.trainer.ranks import Ranks

FULL = {"adapter": "none", "seed": 1, "validation_split": 0.2, "parallel": {"shard": True}}
SLOW = {**STEPS, "learning_rate": 1e-5}
TRAININGS: dict[str, dict[str, Any]] = {
    "SFT, then DPO": {"sft": {"hyperparameters": SLOW}, "method": dpo_method(**SLOW)},
    "a row a step": {"method": dpo_method(**{**SLOW, "batch_size": 1})},  # the other ranks idle
    "AOT": {"method": dpo_method(loss="aot", **SLOW)},
    "reward model": {"method": dpo_method(loss="reward_model", **SLOW)},
    "SFT, then rewards, a row a step": {
        "sft": {"hyperparameters": {**SLOW, "batch_size": 1}},
        "method": dpo_method(loss="reward_model", **SLOW),
    },
    "RMSprop, early stopping": {
        "method": dpo_method(optimizer="rmsprop", early_stopping={"patience": 1, "metric": "eval/loss"}, **SLOW)
    },
}


def run(folder: Path, model: Path, name: str, ranks: int, resume: Path | None = None) -> list[Event]:
    make_work_folder(folder, model, {**FULL, **TRAININGS[name]}, ranks, train=PAIRS)
    if resume is not None:
        resume.rename(folder / "resume")
    status, events = run_process(folder)
    assert status == 0, (folder / "trainer.log").read_text()
    divided = f"Each of the {ranks} devices keeps a part of the model."
    assert any(event["message"] == divided for event in of_kind(events, "message")) == (ranks > 1)
    return events


def validated(folder: Path) -> torch.Tensor:
    """The log-probs, or rewards, of the validation rows at the end."""
    lines = (folder / "output" / "validation_logps.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return torch.tensor([row.get("logps", row.get("rewards")) for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_divided_model_ends_with_the_log_probs_of_a_whole_one(llama: Path, tmp_path: Path, name: str) -> None:
    run(tmp_path / "whole", llama, name, 1)
    expected = validated(tmp_path / "whole")
    # A reward is a sum of large terms that nearly cancel, so its error is that of the largest rewards.
    atol = 1e-6 * (expected.abs().max().item() if "reward" in name else 1)
    for ranks in (2, 3):
        run(tmp_path / str(ranks), llama, name, ranks)
        torch.testing.assert_close(validated(tmp_path / str(ranks)), expected, rtol=1e-6, atol=atol)
    weights = load_file(tmp_path / "whole" / "output" / "model.safetensors")
    divided = load_file(tmp_path / "2" / "output" / "model.safetensors")
    assert divided.keys() == weights.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(divided[key], tensor, rtol=0, atol=1e-6)


def test_the_same_number_of_ranks_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(tmp_path / name, llama, "AOT", 2)
    one, two = (tmp_path / name / "output" / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    AutoModelForCausalLM.from_pretrained(one.parent)


def test_tied_weights_of_a_base_in_16_bits_are_saved_once_and_in_16_bits(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    model.config.tie_word_embeddings, model.lm_head.weight = True, model.model.embed_tokens.weight
    shutil.copytree(llama, tmp_path / "tied")
    model.save_pretrained(tmp_path / "tied")
    saved = {}
    for ranks in (1, 2):
        run(tmp_path / str(ranks), tmp_path / "tied", "AOT", ranks)
        output = tmp_path / str(ranks) / "output"
        weights = load_file(output / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
        assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
        saved[ranks] = set(weights)
    assert saved[1] == saved[2] and "lm_head.weight" not in saved[2]


def test_a_divided_training_that_loses_a_rank_ends_as_if_it_was_killed(llama: Path, tmp_path: Path) -> None:
    """So its attempt counts as lost, and the job goes on."""
    make_work_folder(tmp_path / "run", llama, {**FULL, **TRAININGS["AOT"]}, 2, train=PAIRS)
    with TrainerProcess(tmp_path / "run") as process:
        events = process.events()
        next(event for event in events if event["kind"] == "stage")
        os.kill(int((tmp_path / "run" / "ranks" / "1" / "beat").read_text()), signal.SIGKILL)
        assert not of_kind(list(events), "failed") and process.status() == -signal.SIGKILL


@pytest.mark.parametrize("fields", [{"adapter": "none"}, {}])
def test_a_model_whose_texts_are_computed_one_by_one_is_not_divided(
    tmp_path: Path, llama: Path, fields: dict[str, Any]
) -> None:
    shutil.copytree(llama, tmp_path / "dynamic")
    config = json.loads((llama / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (tmp_path / "dynamic" / "config.json").write_text(json.dumps(config))
    spec = {"seed": 1, "method": dpo_method(**SLOW), "parallel": {"shard": True}, **fields}
    make_work_folder(tmp_path / "run", tmp_path / "dynamic", spec, 2, train=PAIRS)
    status, events = run_process(tmp_path / "run")
    (failed,) = of_kind(events, "failed")
    assert status == 1 and failed["param"] == "parallel.shard"
    assert "cannot be sharded: its texts are computed one by one" in failed["message"]


def test_the_moments_of_a_divided_model_go_to_several_files_which_resume_reads_together(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one rank, where each part is the whole."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 50_000)
    policy = load(llama, adapter="none")
    policy.root = Root(policy.causal)
    optimizer = torch.optim.AdamW(policy.trainable().values())
    for parameter in policy.trainable().values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert checkpoint._save_optimizer(tmp_path, policy, optimizer, Ranks()) == {}
    files = [load_file(path) for path in tmp_path.glob("optimizer*.safetensors")]
    assert len(files) > 2 and all(files)
    (tmp_path / "state").mkdir()
    for path in tmp_path.glob("optimizer*.safetensors"):
        path.rename(tmp_path / "state" / path.name)
    (tmp_path / "state" / "state.json").write_text(json.dumps({"optimizer": {}, "stage_step": 1}))
    other = torch.optim.AdamW(policy.trainable().values())
    method = Supervised(Launcher(policy), SupervisedHyperparameters(), Rows.of([]), Rows.of([]))
    checkpoint.restore(tmp_path, policy, other, method, tmp_path / "best", Ranks())
    for parameter in policy.trainable().values():
        assert optimizer.state[parameter].keys() == other.state[parameter].keys()
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[parameter][key], value)


def test_a_divided_training_goes_on_with_another_number_of_ranks(llama: Path, tmp_path: Path) -> None:
    """From two ranks to one, and from there to two."""
    name = "SFT, then DPO"
    run(tmp_path / "whole", llama, name, 1)
    run(tmp_path / "two", llama, name, 2)
    run(tmp_path / "one", llama, name, 1, tmp_path / "two" / "checkpoints" / "step-1")
    run(tmp_path / "again", llama, name, 2, tmp_path / "one" / "checkpoints" / "step-3")
    expected = validated(tmp_path / "whole")
    for folder in ("two", "one", "again"):
        torch.testing.assert_close(validated(tmp_path / folder), expected, rtol=1e-6, atol=1e-6)
