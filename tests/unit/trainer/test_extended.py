"""Adapters within the products of a base in NF4 give what they give beside them."""

import io
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from app.spec.job import JobSpec
from tests.helpers.hardware import choose, choose_as_on_a_gpu
from tests.helpers.ranks import LOADING, ThreadRanks, gradient_on, on_ranks
from tests.helpers.tiny_model import make_tiny_model
from tests.helpers.trainer import (
    BASE_NAME,
    disturb,
    dpo_method,
    load,
    make_pairs,
    make_row,
    make_work_folder,
    of_kind,
    parse,
    run_in_process,
)
from worker.trainer import extended, memory
from worker.trainer.data import Row
from worker.trainer.dataset import Rows
from worker.trainer.events import Events
from worker.trainer.exactness import check
from worker.trainer.extended import BLOCK, Packed, dequantised, is_extendable
from worker.trainer.gradients import Sum
from worker.trainer.launcher import Launcher
from worker.trainer.loading import load_policy
from worker.trainer.lora import LoraLinear4bit
from worker.trainer.model import Base, Policy
from worker.trainer.packing import Pack
from worker.trainer.shards import Shards

ROWS = [make_row(number, 20 + number, 9, 5) for number in range(6)]


@pytest.fixture
def within(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of layers of all sizes are within their products."""
    choose(monkeypatch, extended_share=inf)


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
    policy.groups.use(True)
    layer = policy.causal.model.layers[0].mlp.gate_proj
    x = torch.randn(3, 5, layer.in_features)
    with torch.no_grad():
        plain = layer(x)
        layer.base_layer.bias = nn.Parameter(torch.arange(float(layer.out_features)))
        torch.testing.assert_close(layer(x), plain + layer.base_layer.bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"quant_type": "fp4"}, {"blocksize": 128}, {"quant_storage": torch.bfloat16}],
    ids=str,
)
def test_a_weight_that_is_packed_in_another_way_stays_as_it_is(options: dict[str, Any]) -> None:
    settings = {"quant_type": "nf4", "blocksize": 64, "requires_grad": False, **options}
    layer = Linear4bit(128, 64, bias=False)
    layer.weight = Params4bit(torch.randn(64, 128), **settings).to("cpu")
    assert not is_extendable(layer)
    layer.weight = Params4bit(torch.randn(64, 128), requires_grad=False, quant_type="nf4", blocksize=64).to("cpu")
    assert is_extendable(layer) and not is_extendable(nn.Linear(64, 64))
    layer.in_features = BLOCK + 8  # its blocks would cross rows
    assert not is_extendable(layer)


def test_a_group_with_large_ranks_stays_beside_its_product(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, extended_share=1.0)  # a block in 64 inputs
    policy = load(llama, quantization="nf4", adapter={"r": 24})  # 72 columns of q, k and v
    assert groups(policy)[:3] == [["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fields", [{}, {"double_quantization": False}, {"adapter": {"r": 24}}], ids=str)
def test_weights_that_stay_dequantised_give_the_same_bits(
    llama: Path, fields: dict[str, Any], recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both passes, also after an update of the adapter, and with its old weights again."""
    policy = disturb(load(llama, quantization="nf4", **fields))
    policy.recompute_activations(recompute)
    start = {name: weight.detach().clone() for name, weight in policy.trainable().items()}

    def outcomes() -> list[Any]:
        found = [outcome(policy, ROWS)]
        for factor in (-2.0, 1.0):
            for name, weight in policy.trainable().items():
                weight.data.copy_(factor * start[name])
            found.append(outcome(policy, ROWS))
        return found

    expected = outcomes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_bytes", lambda _: 4 * policy.groups.dequantised_bytes)
        assert memory.keep_weights(policy) == policy.groups.dequantised_bytes / 1e9
    assert sum(weight.nbytes for weight in policy.groups.kept) == policy.groups.dequantised_bytes
    monkeypatch.setattr(extended, "dequantised", lambda *_: pytest.fail("they are kept"))
    actual = outcomes()
    monkeypatch.undo()
    assert policy.groups.release() and not policy.groups.release()
    for found in (actual, outcomes()):
        for (ours, our_gradients), (theirs, their_gradients) in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)
            for our_sum, their_sum in zip(our_gradients, their_gradients, strict=True):
                assert our_sum and all(torch.equal(our_sum[name], values) for name, values in their_sum.items())


@pytest.mark.usefixtures("within")
def test_weights_stay_dequantised_only_where_memory_is_free(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no activations."""
    policy = load(llama, quantization="nf4")
    (pack,) = policy.packs(ROWS, range(len(ROWS)))
    expected = memory.activation_bytes(policy, pack)
    size = policy.groups.dequantised_bytes
    monkeypatch.setattr(memory, "free_bytes", lambda _: 4 * size - 1)
    assert memory.keep_weights(policy) == 0 and not policy.groups.kept
    monkeypatch.setattr(memory, "free_bytes", lambda _: 4 * size)
    assert memory.keep_weights(policy) == size / 1e9 and policy.groups.kept
    assert memory.activation_bytes(policy, pack) == expected
    plain = load(llama)
    assert memory.keep_weights(plain) == 0 and not plain.groups.kept


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize(("fits", "said"), [(True, "Weights do not stay"), (False, "Activations are recomputed")])
def test_activations_come_before_dequantised_weights(
    llama: Path, tmp_path: Path, fits: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fits`: whether the activations fit without these weights."""
    monkeypatch.setattr(memory, "activations_fit", lambda policy, *_: fits and not policy.groups.kept)
    method = dpo_method(max_steps=2, batch_size=4, learning_rate=1e-3)
    fields = {"adapter": {"r": 4}, "quantization": "nf4", "seed": 0, "validation_split": 0.0, "method": method}
    events = run_in_process(make_work_folder(tmp_path, llama, fields, train=make_pairs(8)))
    messages = [event["message"] for event in of_kind(events, "message")]
    assert next(message for message in messages if "stay dequantised" in message).startswith("Memory is free: 0.0 GB")
    assert [message for message in messages if message.startswith(said)]


@pytest.mark.usefixtures("within")
def test_a_launch_that_runs_out_of_memory_first_gives_up_dequantised_weights(llama: Path) -> None:
    policy, stream = load(llama, quantization="nf4"), io.StringIO()
    policy.groups.keep()
    launcher = Launcher(policy, events=Events(stream))

    def scores(pack: Pack) -> dict[str, Tensor]:
        if policy.groups.kept:
            raise torch.OutOfMemoryError
        return {"logps": policy.score(pack).responses}

    ((_, values),) = launcher.forward(policy.segments(ROWS, range(len(ROWS))), scores)
    assert len(values["logps"]) == 2 * len(ROWS)
    (message,) = of_kind(parse(stream), "message")
    assert "do not stay dequantised" in message["message"]
    assert policy.room is None and not policy.recomputes_activations


@pytest.mark.usefixtures("within")
def test_longer_rows_are_forgotten_with_the_last_layer(llama: Path) -> None:
    policy = load(llama, quantization="nf4")
    outcome(policy, ROWS)
    assert policy.groups.on and all(group._rows is None and group._x is None for group in policy.groups.all)


@pytest.mark.usefixtures("within")
def test_a_pass_that_fails_within_a_group_leaves_nothing(llama: Path) -> None:
    policy = load(llama, quantization="nf4")
    layer = policy.causal.model.layers[1].mlp.up_proj

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        outcome(policy, ROWS)
    hook.remove()
    assert layer.group._rows is not None
    policy.groups.use(False)  # as the next pass does, and the launcher before it
    assert layer.group._rows is None


@pytest.mark.usefixtures("within")
def test_only_packs_are_computed_within_products(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(llama, quantization="nf4")
    outcome(policy, ROWS)
    monkeypatch.setattr(extended.Group, "output", lambda *_: pytest.fail("this is no pack"))
    with policy.own_attention_in_use():
        policy.logits(torch.arange(2, 9))


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize("fields", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_modules_that_are_trained_in_full_are_no_hindrance(
    llama: Path, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits: these modules have 32."""
    choose_as_on_a_gpu(monkeypatch)
    policy = load(llama, quantization="nf4", adapter={"r": 4, **fields})
    assert len(policy.groups.all) == 4 * policy.causal.config.num_hidden_layers


@pytest.mark.usefixtures("within")
def test_recomputed_activations_give_the_same_gradients(llama: Path) -> None:
    outcomes = []
    for recompute in (False, True):
        policy = disturb(load(llama, quantization="nf4"))
        policy.recompute_activations(recompute)
        outcomes.append(outcome(policy, ROWS))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    for ours, theirs in zip(outcomes[0][1], outcomes[1][1], strict=True):
        assert ours and all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())


def test_a_sharded_base_gives_the_bits_of_a_whole_one(tmp_path: Path) -> None:
    """With five layers: each place of a gathered layer is used again before the backward pass."""
    make_tiny_model(tmp_path, layers=5)
    base, rows = Base(BASE_NAME, None, None, tmp_path), Rows.of(ROWS)
    adapter = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    body = {"model": BASE_NAME, "training_file": "train.jsonl", "adapter": adapter, "seed": 1, "quantization": "nf4"}
    spec = JobSpec.model_validate(body).resolved()

    def step(ranks: ThreadRanks, shards: Shards | None) -> Any:
        with LOADING:
            policy = disturb(load_policy(spec, base, None, Events(io.StringIO()), shards))
        layers: list[Any] = [layer for layer in policy.model.modules() if isinstance(layer, LoraLinear4bit)]
        with policy.own_attention_in_use():
            policy.groups = extended.join(policy.causal, layers, inf)  # a pass, for which the ranks meet
        assert len(groups(policy)) == 4 * policy.causal.config.num_hidden_layers
        check(policy, ROWS, Events(io.StringIO()))
        return gradient_on(ranks, policy, "sigmoid", rows, 60, 3)

    ((expected, metrics),) = on_ranks(1, lambda ranks: step(ranks, None))
    results = on_ranks(2, lambda ranks: step(ranks, Shards(ranks)))
    assert [result for _, result in results] == [metrics] * 2
    actual = {name: gradient for part, _ in results for name, gradient in part.items()}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())
