"""A base in four bits: it really is quantised, and a validation does not change it."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor

from tests.helpers.trainer import (
    ROWS,
    disturb,
    gradients,
    load,
    make_pairs,
    make_run,
    make_work_folder,
    plain_logps,
    sft_method,
)
from worker.trainer.checkpoint import State
from worker.trainer.loading import load_policy
from worker.trainer.loop import stages_of
from worker.trainer.stage_run import StageRun, begin

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def quantised_projections(model: torch.nn.Module) -> set[str]:
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    return {f"{name.split('.layers.')[1].split('.')[0]}.{name.split('.')[-2]}" for name, _ in modules}


def test_every_projection_is_in_nf4_and_the_adapter_is_not(llama: Path) -> None:
    policy = load(llama, quantization="nf4")
    layers = [module for module in policy.model.modules() if isinstance(module, Linear4bit)]
    assert quantised_projections(policy.model) == {
        f"{layer_index}.{name}" for layer_index in range(2) for name in PROJECTIONS
    }
    for layer in layers:
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested  # the scales are quantised too
        assert not layer.weight.requires_grad
    assert len(policy.trainable()) == 28
    assert all(parameter.dtype == torch.float32 and "lora" in name for name, parameter in policy.trainable().items())


def test_four_bits_change_the_log_probs_a_little(llama: Path) -> None:
    exact, quantised = load(llama), load(llama, quantization="nf4")
    with torch.no_grad():
        for row in ROWS:
            tokens = torch.tensor([len(response.ids) for response in row.responses])
            change_per_token = (plain_logps(quantised, row) - plain_logps(exact, row)).abs() / tokens
            assert bool((change_per_token > 1e-4).all())
            assert bool((change_per_token < 1.0).all())


@pytest.fixture(params=["llama", "qwen3"])
def stage_run(request: pytest.FixtureRequest, tmp_path: Path) -> StageRun:
    """A stage before its first step, with a policy that has left its start."""
    spec = {
        "method": sft_method(),
        "adapter": {"r": 4, "dropout": 0.1},
        "quantization": "nf4",
        "seed": 0,
        "validation_split": 0.5,
    }
    folder = make_work_folder(tmp_path, request.getfixturevalue(request.param), spec, train=make_pairs(12))
    run = make_run(folder)
    policy = disturb(load_policy(run.spec, run.base, None, run.events))
    (stage,) = stages_of(run)
    return begin(run, stage, policy, State(stage.name), stage.steps)


def scores_and_gradients(stage_run: StageRun) -> tuple[Tensor, dict[str, Tensor]]:
    rows = stage_run.stage.train
    (pack,) = stage_run.policy.packs(rows, list(range(len(rows))))
    responses = stage_run.policy.score(pack).responses
    return responses.detach(), gradients(stage_run.policy, responses.sum())


def test_a_validation_changes_no_bit_of_log_probs_or_gradients(stage_run: StageRun) -> None:
    before, gradients_before = scores_and_gradients(stage_run)
    metrics = stage_run.validate()
    after, gradients_after = scores_and_gradients(stage_run)

    assert metrics["eval/loss"] > 0
    assert torch.equal(before, after)
    assert gradients_before.keys() == gradients_after.keys()
    for name, gradient in gradients_before.items():
        assert gradient.any(), name
        assert torch.equal(gradient, gradients_after[name]), name


def test_the_gradients_of_a_quantised_base_equal_those_of_its_dequantised_weights(stage_run: StageRun) -> None:
    """The 4-bit layers are replaced by ordinary ones. A validation comes before, since that is where errors begin."""
    stage_run.validate()
    scores, quantised = scores_and_gradients(stage_run)
    for module in stage_run.policy.model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, Linear4bit):
                setattr(module, name, dequantised(child))
    expected_scores, expected = scores_and_gradients(stage_run)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        tolerance = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(quantised[name], gradient, rtol=0, atol=tolerance, msg=name)


def dequantised(layer: Linear4bit) -> torch.nn.Linear:
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    plain.weight = torch.nn.Parameter(dequantize_4bit(layer.weight.data, layer.weight.quant_state), False)
    return plain


def test_quantised_layers_stay_in_training_mode(stage_run: StageRun) -> None:
    """In evaluation mode, a 4-bit layer keeps other weights on some CPUs, and these have no gradient."""
    stage_run.validate()
    quantised = [module for module in stage_run.policy.model.modules() if isinstance(module, Linear4bit)]
    assert quantised and all(module.training for module in quantised)


def test_dropout_is_in_the_adapter_only_and_set_dropout_switches_it(llama: Path) -> None:
    policy = disturb(load(llama, adapter={"r": 4, "dropout": 0.5}))
    (pack,) = policy.packs(ROWS, [0, 1, 2])

    def two_scores(enabled: bool) -> tuple[Tensor, Tensor]:
        policy.set_dropout(enabled)
        with torch.no_grad():
            return policy.score(pack).responses, policy.score(pack).responses

    first, second = two_scores(True)
    assert not torch.allclose(first, second)
    deterministic, repeated = two_scores(False)
    assert torch.equal(deterministic, repeated)
    expected = torch.cat([plain_logps(policy, ROWS[number]) for number in pack.rows])
    torch.testing.assert_close(deterministic, expected, rtol=1e-5, atol=0)
