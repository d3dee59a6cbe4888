"""The engine as on a GPU, on a CPU: 16 bits, one attention kernel for a whole pack, few widths of packs.

So no branch of the engine waits for a card. Only the kernels themselves, and the memory of a card, need one.
"""

import io
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from app.estimates import memory
from app.estimates.memory import BUDGET, LOGITS, SAMPLED_ANSWERS, SAMPLED_TOKENS
from tests.helpers.hardware import causal_attention, choose_as_on_a_gpu, dense_attention, use_own_kernel
from tests.helpers.trainer import (
    ROWS,
    Event,
    disturb,
    dpo_method,
    load,
    make_pairs,
    make_row,
    make_work_folder,
    of_kind,
    parse,
    run_in_process,
    sft_method,
)
from tests.helpers.versions import FP8_ON_A_CPU
from worker.trainer import attention, packing
from worker.trainer.data import Row
from worker.trainer.events import Events
from worker.trainer.exactness import check
from worker.trainer.gradients import Sum
from worker.trainer.hardware import BY_KIND, GPU
from worker.trainer.launcher import Launcher
from worker.trainer.masks import Blocks, TreeMask
from worker.trainer.model import Policy
from worker.trainer.packing import Packing

PAIRS = make_pairs(12)
PLAIN = {"adapter": {"r": 4}, "quantization": "none", "seed": 0, "validation_split": 0.25}
STEPS = {"max_steps": 3, "batch_size": 4, "learning_rate": 3e-4}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT, then DPO, on nf4": ("llama", {
        "quantization": "nf4", "sft": {"hyperparameters": STEPS}, "method": dpo_method(**STEPS),
    }),
    "KTO on int8": ("llama", {"quantization": "int8", "method": dpo_method(loss="kto", **STEPS)}),
    "a reward model": ("llama", {"method": dpo_method(loss="reward_model", **STEPS)}),
    "a sliding window": ("mistral", {"method": dpo_method(**STEPS)}),
    "float16": ("qwen3", {"compute_dtype": "fp16", "method": dpo_method(**STEPS)}),
    "all parameters": ("llama", {"adapter": "none", "method": sft_method(**STEPS)}),
    "a trained head": ("llama", {
        "adapter": {"r": 4, "modules_to_save": ["lm_head"]}, "method": dpo_method(loss="simpo", **STEPS),
    }),
}  # fmt: skip
"""Jobs by name: the architecture and the fields of the spec."""


@pytest.mark.parametrize("name", JOBS)
def test_a_job_has_the_losses_of_a_cpu_to_16_bits(
    request: pytest.FixtureRequest, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, fields = JOBS[name]
    model, spec = request.getfixturevalue(architecture), {**PLAIN, **fields}
    expected = losses_of(run_in_process(make_work_folder(tmp_path / "cpu", model, spec, train=PAIRS)))
    choose_as_on_a_gpu(monkeypatch)
    events = run_in_process(make_work_folder(tmp_path / "gpu", model, spec, train=PAIRS))
    losses = losses_of(events)
    assert losses == pytest.approx(expected, rel=0.02, abs=0.02)
    assert losses != expected  # they are computed in other dtypes
    messages = [event["message"] for event in of_kind(events, "message")]
    assert not any("tree by tree" in message or "not shared" in message for message in messages)


def losses_of(events: list[Event]) -> list[float]:
    """The training losses of all stages."""
    return [event["metrics"]["loss"] for event in of_kind(events, "metrics") if "loss" in event["metrics"]]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_log_probs_and_gradients_are_those_of_a_cpu_to_16_bits(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, architecture: str, quantization: str
) -> None:
    """In packs of several segments, whose gradients are summed. NF4 would quantise other weights, rounded to 16 bits."""
    model = request.getfixturevalue(architecture)
    rows = [make_row(number, 40 + number, 30, 20 + number) for number in range(30)]

    def outcome() -> tuple[Tensor, dict[str, Tensor]]:
        policy = disturb(load(model, quantization=quantization), 0.02)
        launcher = Launcher(policy)
        plan = launcher.plan(list(policy.segments(rows, range(len(rows)))))
        scores, _ = launcher.backward(plan, lambda pack, _: both(policy.score(pack).responses))
        gradients = {name: parameter.grad for name, parameter in policy.trainable().items()}
        return scores["logps"], {name: gradient for name, gradient in gradients.items() if gradient is not None}

    def both(logps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return logps.sum(), {"logps": logps}

    expected, expected_gradients = outcome()
    choose_as_on_a_gpu(monkeypatch)
    logps, in_16_bits = outcome()
    torch.testing.assert_close(logps.float(), expected.float(), rtol=0.02, atol=0.2)
    assert in_16_bits.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), in_16_bits[name].flatten(), dim=0)
        assert cosine > 0.98, name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:The .grad attribute")
def test_the_check_takes_a_kernel_that_is_as_exact_as_attention_tree_by_tree(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlexAttention itself, forward and backward."""
    choose_as_on_a_gpu(monkeypatch)
    use_own_kernel(monkeypatch)
    policy, stream = disturb(load(llama), 0.02), io.StringIO()
    check(policy, ROWS, Events(stream))
    assert policy.shared and policy.blocks and policy.joins
    assert parse(stream) == []


@pytest.mark.parametrize("wrong", ["a key too many", "a backward pass that is off", "no kernel"])
def test_the_check_computes_attention_tree_by_tree_if_the_kernel_is_wrong(
    llama: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    choose_as_on_a_gpu(monkeypatch)
    of = Blocks.of
    if wrong == "a key too many":
        monkeypatch.setattr(Blocks, "of", lambda ranges: of(ranges._replace(own=(ranges.own - 1).clamp(min=0))))
    else:
        kernel = _off_by_a_tenth if wrong == "a backward pass that is off" else _missing
        monkeypatch.setattr(attention, "_compiled_flex", lambda: kernel)
    policy, stream = disturb(load(llama), 0.02), io.StringIO()
    check(policy, ROWS, Events(stream))
    assert policy.shared and not policy.blocks
    (message,) = of_kind(parse(stream), "message")
    assert "tree by tree" in message["message"] and message["level"] == "warn"


def test_the_backward_pass_of_sdpa_adds_in_a_fixed_order() -> None:
    """It does so only where torch would raise an error for other operators."""
    query, key = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(2))
    pack = next(Packing(32).packs([make_row(1, 4, 3, 2)], [0]))
    seen = list[bool]()
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        attended = attention._by_tree(query, key, key, pack.mask, None, None, None, None)
        node = attended.grad_fn
        while node is not None and "ScaledDotProduct" not in node.name():
            node = node.next_functions[0][0]
        assert node is not None
        node.register_prehook(lambda _: seen.append(torch.is_deterministic_algorithms_warn_only_enabled()))
        attended.sum().backward()  # type: ignore[no-untyped-call]
        assert seen == [False]
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _off_by_a_tenth(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attention with the right results, and gradients of the keys that are a tenth too large."""
    key = 1.1 * key - (0.1 * key).detach()
    attended: Tensor = dense_attention(query, key, value, **options)
    return attended


def _missing(*_: object, **__: object) -> Tensor:
    raise RuntimeError("Failed to find C compiler")


def test_packs_of_all_widths_and_windows_compile_the_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by torch's own compiler, without kernels at its end."""
    torch._dynamo.reset()
    counters.clear()
    compiler = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compiler)
    kernel = attention._compiled_flex.__wrapped__()
    monkeypatch.setattr(attention, "_compiled_flex", lambda: kernel)
    rows = [make_row(number, 20 + 31 * number, 10 + 7 * number, 5 + 11 * number) for number in range(12)]
    widths = set()
    for budget in (1024, 2048, 3072):
        pack = next(Packing(budget, windows=(None, 64, 200)).packs(rows, range(len(rows))))
        widths.add(pack.slots)
        query, key = torch.randn(1, 4, pack.slots, 16), torch.randn(1, 2, pack.slots, 16)
        for blocks in pack.mask.blocks.values():
            mask = TreeMask(pack.mask.ranges, pack.mask.positions, pack.mask.spans, {None: blocks})
            attention.tree_attention(torch.nn.Module(), query, key, key, scaling=0.3, softcap=50.0, tree=mask)
    assert widths == {1024, 2048, 3072}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:The .grad attribute")
@pytest.mark.filterwarnings(
    "ignore:<class .torch.autograd.function.Function.> should not be instantiated", "ignore:.*lru_cache"
)
@pytest.mark.parametrize(
    ("base", "keep"),
    [
        ({"quantization": "nf4"}, False),
        ({"quantization": "nf4"}, True),
        ({"quantization": "none"}, False),
        pytest.param({"compute_dtype": "fp8"}, False, marks=FP8_ON_A_CPU),
    ],
    ids=str,
)
def test_layers_compile_without_a_break(
    llama: Path, base: dict[str, Any], keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With FlexAttention itself. `keep`: whether weights in NF4 stay dequantised."""
    choose_as_on_a_gpu(monkeypatch)
    use_own_kernel(monkeypatch)
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    policy = load(llama, **base)
    if keep:
        policy.groups.keep()
        assert policy.groups.kept
    policy.compiled = True
    train(policy, [make_row(number, 60, 30, 20) for number in range(4)])
    assert counters["stats"]["unique_graphs"] == 2  # the input of the first layer needs no gradient
    assert not counters["graph_break"]


@pytest.mark.filterwarnings(
    "ignore:<class .torch.autograd.function.Function.> should not be instantiated", "ignore:The .grad attribute"
)
def test_200_packs_of_any_lengths_compile_a_layer_four_times(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer apart from the others, and packs of one segment apart from those of several."""
    choose_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(attention, "_flex_attention", lambda: causal_attention)
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    policy, source, widths = load(llama, quantization="nf4"), random.Random(0), set()
    policy.compiled = True
    for _ in range(200):
        policy.packing = replace(policy.packing, segment_tokens=source.randrange(100, 600))
        lengths = [[source.randrange(5, 200) for _ in range(3)] for _ in range(source.randrange(1, 6))]
        widths.add(train(policy, [make_row(number, *three) for number, three in enumerate(lengths)]))
    assert len(widths) > 1
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]


def train(policy: Policy, rows: list[Row]) -> int:
    """A forward and a backward pass over one pack of `rows`. Returns its width."""
    segments = list(policy.segments(rows, range(len(rows))))
    pack, sums = policy.packing.build(segments), [Sum() for _ in segments]
    with policy.segment_gradients.added_to(sums, pack.extents):
        policy.score(pack).responses.sum().backward()  # type: ignore[no-untyped-call]
    assert all(len(total) == len(policy.trainable()) for total in sums)
    return pack.slots


def test_the_estimates_of_memory_have_the_engines_sizes() -> None:
    assert {kind: choices.pack_tokens for kind, choices in BY_KIND.items()} == BUDGET
    assert {kind: choices.sampled_tokens for kind, choices in BY_KIND.items()} == SAMPLED_TOKENS
    assert {kind: choices.sampled_answers for kind, choices in BY_KIND.items()} == SAMPLED_ANSWERS
    assert GPU.head_logits == LOGITS
    assert packing.WIDTH_STEP == memory.WIDTH_STEP
    assert packing.SEGMENT_TOKENS == memory.SEGMENT_TOKENS
