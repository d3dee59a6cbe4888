"""Adapters within the products of a base in NF4 give what they give beside them."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from app.spec.job import JobSpec
from tests.helpers.hardware import choose
from tests.helpers.ranks import LOADING, ThreadRanks, gradient_on, on_ranks
from tests.helpers.trainer import BASE_NAME, disturb, load, make_row
from worker.trainer import extended, lora
from worker.trainer.data import Row
from worker.trainer.dataset import Rows
from worker.trainer.events import Events
from worker.trainer.exactness import check
from worker.trainer.extended import BLOCK, Packed, dequantised, is_extendable
from worker.trainer.gradients import Sum
from worker.trainer.loading import load_policy
from worker.trainer.lora import LoraLinear4bit
from worker.trainer.model import Base, Policy
from worker.trainer.shards import Shards

ROWS = [make_row(number, 20 + number, 9, 5) for number in range(6)]


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of layers of all sizes are within their products."""
    choose(monkeypatch, extended_from=BLOCK)
    monkeypatch.setattr(lora, "LEAST_TOKENS", 1)


def groups(policy: Policy) -> list[list[str]]:
    """The names of the layers that share longer rows."""
    names = dict[int, list[str]]()
    for name, layer in policy.causal.named_modules():
        if isinstance(layer, LoraLinear4bit) and layer.group is not None:
            names.setdefault(id(layer.group), []).append(name.rpartition(".")[2])
    return list(names.values())


def outcome(policy: Policy, rows: Sequence[Row]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The log-probs of `rows` in one pack of several segments, and the gradients of each segment."""
    packing = replace(policy.packing, segment_tokens=60)
    segments = list(packing.segments(rows, range(len(rows))))
    assert len(segments) > 1
    pack = packing.build(segments)
    sums: list[Sum] = [{} for _ in segments]
    with policy.segment_gradients.added_to(sums, pack.extents):
        logps = policy.score(pack).responses
        (logps * torch.arange(1, len(logps) + 1)).sum().backward()  # type: ignore[no-untyped-call]
    names = {parameter: name for name, parameter in policy.trainable().items()}
    return logps.detach(), [{names[parameter]: gradient for parameter, gradient in each.items()} for each in sums]


@pytest.mark.parametrize(
    "adapter", [{"r": 4}, {"r": 40}, {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}], ids=str
)
@pytest.mark.parametrize("settings", [{}, {"double_quantization": False}], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_log_probs_and_gradients_are_those_of_adapters_beside_the_product(
    request: pytest.FixtureRequest,
    architecture: str,
    adapter: dict[str, Any],
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = request.getfixturevalue(architecture)
    policy = disturb(load(model, quantization="nf4", adapter=adapter, **settings))
    assert not groups(policy)
    expected, expected_gradients = outcome(policy, ROWS)
    request.getfixturevalue("within")
    policy = disturb(load(model, quantization="nf4", adapter=adapter, **settings))
    chosen = adapter.get(
        "target_modules", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    names = [[name for name in group if name in chosen] for group in layer]
    assert groups(policy) == [group for group in names if group] * policy.causal.config.num_hidden_layers
    logps, gradients = outcome(policy, ROWS)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            tolerance = 1e-4 * float(theirs[name].abs().max())
            torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("double", [True, False])
def test_a_weight_with_more_columns_has_the_bits_of_the_weight(llama: Path, double: bool) -> None:
    policy = load(llama, quantization="nf4", double_quantization=double)
    layer = policy.causal.model.layers[0].mlp.down_proj.base_layer
    weight = dequantised(Packed.of(layer), 2 * BLOCK, torch.float32)
    assert torch.equal(weight[:, : layer.in_features], dequantize_4bit(layer.weight, layer.weight.quant_state))
    assert weight.shape == (layer.out_features, layer.in_features + 2 * BLOCK)
    assert not weight[:, layer.in_features :].any()


@pytest.mark.usefixtures("within")
def test_a_bias_is_added(llama: Path) -> None:
    policy = disturb(load(llama, quantization="nf4"))
    layer = policy.causal.model.layers[0].mlp.gate_proj
    x = torch.randn(3, 5, layer.in_features)
    with torch.no_grad():
        plain = layer(x)
        layer.base_layer.bias = nn.Parameter(torch.arange(float(layer.out_features)))
        torch.testing.assert_close(layer(x), plain + layer.base_layer.bias, rtol=1e-5, atol=1e-4)


def test_a_layer_whose_blocks_cross_rows_stays_as_it_is(llama: Path) -> None:
    layer = load(llama, quantization="nf4").causal.model.layers[0].mlp.down_proj.base_layer
    assert is_extendable(layer, BLOCK) and not is_extendable(layer, 10 * BLOCK)
    layer.in_features = BLOCK + 8
    assert not is_extendable(layer, BLOCK) and not is_extendable(nn.Linear(64, 64), BLOCK)


@pytest.mark.usefixtures("within")
def test_longer_rows_are_forgotten_with_the_last_layer(llama: Path) -> None:
    policy = load(llama, quantization="nf4")
    outcome(policy, ROWS)
    for layer in policy.causal.modules():
        if isinstance(layer, LoraLinear4bit):
            assert layer.group is not None and layer.group._rows is None and layer.group._x is None


@pytest.mark.usefixtures("within")
def test_few_tokens_are_computed_beside_the_product(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(llama, quantization="nf4")
    monkeypatch.setattr(lora, "LEAST_TOKENS", 1024)
    monkeypatch.setattr(extended.Group, "output", lambda *_: pytest.fail("too few tokens"))
    with policy.own_attention_in_use():
        policy.logits(torch.arange(2, 9))


def test_a_sharded_base_gives_the_bits_of_a_whole_one(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "LEAST_TOKENS", 1)
    base, rows = Base(BASE_NAME, None, None, llama), Rows.of(ROWS)
    adapter = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    body = {"model": BASE_NAME, "training_file": "train.jsonl", "adapter": adapter, "seed": 1, "quantization": "nf4"}
    spec = JobSpec.model_validate(body).resolved()

    def step(ranks: ThreadRanks, shards: Shards | None) -> Any:
        with LOADING:
            policy = disturb(load_policy(spec, base, None, Events(io.StringIO()), shards))
        layers: list[Any] = [layer for layer in policy.model.modules() if isinstance(layer, LoraLinear4bit)]
        with policy.own_attention_in_use():
            extended.join(policy.causal, layers, BLOCK)  # a pass, for which the ranks meet
        assert len(groups(policy)) == 4 * policy.causal.config.num_hidden_layers
        check(policy, ROWS, Events(io.StringIO()))
        return gradient_on(ranks, policy, "sigmoid", rows, 60, 3)

    ((expected, metrics),) = on_ranks(1, lambda ranks: step(ranks, None))
    results = on_ranks(2, lambda ranks: step(ranks, Shards(ranks)))
    assert [result for _, result in results] == [metrics] * 2
    actual = {name: gradient for part, _ in results for name, gradient in part.items()}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())
