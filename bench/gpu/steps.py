"""Single steps of this engine: where their time goes, what options change, memory, lengths, and sampling."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from app.estimates.memory import Linear, MemorySettings, Shape, estimate
from app.spec.hyperparameters import DPOHyperparameters
from app.spec.json_types import JsonObject
from bench.gpu import card, shapes
from bench.gpu.compare import adapted, release, wrapped
from bench.gpu.kernels import random_row
from bench.gpu.shapes import DEVICE, measured, seconds_of, synchronize
from worker.trainer import fp8
from worker.trainer.averages import Averages
from worker.trainer.dataset import Rows
from worker.trainer.errors import UserError
from worker.trainer.launcher import Launcher
from worker.trainer.memory import activation_bytes
from worker.trainer.methods.preference import Preference
from worker.trainer.model import Policy
from worker.trainer.reference import References, compute
from worker.trainer.sampling import CompletionRequest, Sampling, sample
from worker.trainer.throughput import layer_weights, needed_flops

GROUPS = {
    "dequantisation": ("dequant",),
    "attention": ("flex", "triton_tem", "flash", "fmha", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "matmul", "sm90_xmma", "cublas", "mm_"),
}
"""Kernel groups by parts of their names. All others are elementwise."""


def _rows(tokens: int, prompt: int, response: int) -> Rows:
    """Random pairs of these lengths, that fill about `tokens` tokens."""
    count = max(1, tokens // (prompt + 2 * response))
    return Rows.of(random_row(number, prompt, response, shapes.vocabulary()) for number in range(count))


def _step(policy: Policy, rows: Rows) -> Callable[[], None]:
    """The forward and backward pass of a step over `rows`, as the loop runs it."""
    launcher = Launcher(policy)
    method = Preference(launcher, DPOHyperparameters().resolved(full=False), rows, rows[:0])
    method.references = References(compute(launcher, rows), compute(launcher, rows[:0]))
    numbers = list(range(len(rows)))

    def step() -> None:
        method.gradient(numbers, Averages())
        for parameter in policy.trainable().values():
            parameter.grad = None

    return step


def _figures(policy: Policy, rows: Rows) -> JsonObject:
    """Time, speed and memory of a step over `rows`: the median of five, after one that compiles."""
    step = _step(policy, rows)
    first = measured(step)["seconds"]
    runs = [measured(step) for _ in range(1 if shapes.dry else 5)]
    seconds = statistics.median(run["seconds"] for run in runs)
    tokens, scored = sum(row.tokens for row in rows), sum(len(answer.ids) for row in rows for answer in row.responses)
    flops = needed_flops(policy, layer_weights(policy.causal), tokens, scored)
    return {
        "tokens": tokens,
        "first_seconds": first,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "of_products": flops / seconds / card.product_flops(),
        "activation_bytes_per_token": max(run["activation_bytes"] for run in runs) / tokens,
        "recomputed": policy.recomputes_activations,
        "packs_of": policy.launch_tokens,
    }


def one_pack() -> Iterator[JsonObject]:
    """A step of one full pack: speed, memory, and the time of its kernels by group."""
    policy = adapted()
    try:
        rows = _rows(512 if shapes.dry else policy.packing.budget - 256, 128, 64)
        yield _figures(policy, rows)
        yield {"milliseconds_by_group": _profile(_step(policy, rows))}
    finally:
        release(policy)


def _profile(step: Callable[[], None]) -> JsonObject:
    """Milliseconds of a step by group of kernels, and those in which the device idles."""
    step()
    synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        elapsed = measured(step)["seconds"] * 1e3
    groups = dict.fromkeys([*GROUPS, "elementwise"], 0.0)
    largest: dict[str, float] = {}
    for event in profiler.key_averages():
        spent = (event.self_device_time_total if DEVICE.type == "cuda" else event.self_cpu_time_total) / 1e3
        if event.is_user_annotation or (DEVICE.type == "cuda" and event.device_type != DeviceType.CUDA):
            continue
        name = event.key.lower()
        group = next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "elementwise")
        groups[group] += spent
        largest[event.key[:80]] = largest.get(event.key[:80], 0.0) + spent
    top = dict(sorted(largest.items(), key=lambda entry: -entry[1])[:20])
    return {"whole": elapsed, "idle": elapsed - sum(groups.values()), **groups, "kernels": top}


def options() -> Iterator[JsonObject]:
    """A step of one full pack with each option."""
    changes: dict[str, Callable[[Policy], None]] = {
        "as it is": lambda policy: None,
        "weights that stay dequantised": lambda policy: policy.groups.keep(),
        "activations recomputed": lambda policy: policy.recompute_activations(True),
    }
    if not shapes.dry:  # a CPU compiles for minutes
        changes["compiled layers"] = lambda policy: setattr(policy, "compiled", True)
    for name, change in changes.items():
        policy = adapted()
        try:
            change(policy)
            policy.packing = replace(policy.packing, joined=policy.joins)
            yield {name: _figures(policy, _rows(512 if shapes.dry else policy.packing.budget - 256, 128, 64))}
        except (torch.OutOfMemoryError, UserError) as error:
            yield {name: {"error": str(error)[:300]}}
        finally:
            release(policy)
            shapes.free()


def in_fp8() -> Iterator[JsonObject]:
    """A body in FP8: its products beside those in 16 bits, a step, and log-probs beside those of the same weights."""
    tokens = 64 if shapes.dry else 8192
    for module in (shapes.model().model.layers[0].mlp.up_proj, shapes.model().model.layers[0].self_attn.k_proj):
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device=DEVICE, dtype=shapes.dtype())
        x = torch.randn(tokens, module.in_features, device=DEVICE, dtype=shapes.dtype(), requires_grad=True)
        layers = {"plain": linear.requires_grad_(False), "fp8": fp8.Fp8Linear(linear)}
        outputs = {name: layer(x).detach().float() for name, layer in layers.items()}

        def both_passes(layer: nn.Module, x: Tensor = x) -> None:
            output = layer(x)
            output.backward(output.detach())

        yield {
            f"{module.out_features}x{module.in_features}": {
                "seconds": {name: seconds_of(partial(both_passes, layer)) for name, layer in layers.items()},
                "relative_error": float((outputs["fp8"] - outputs["plain"]).norm() / outputs["plain"].norm()),
            }
        }
    policy = adapted(in_fp8=True)
    rows = _rows(512 if shapes.dry else policy.packing.budget - 256, 128, 64)
    try:
        ours = _logps(policy, rows)
        yield {"step": _figures(policy, rows)}
        if not shapes.dry:  # a CPU compiles for minutes
            policy.compiled = True
            yield {"step, compiled layers": _figures(policy, rows)}
    finally:
        release(policy)
        shapes.free()
    policy = wrapped(shapes.random_model().requires_grad_(False), {"quantization": "none"})
    try:
        plain = _logps(policy, rows)
    finally:
        release(policy)
    yield {
        "log_prob_error_per_token": float((ours - plain).abs().mean()) / 64,
        "pairs_in_the_same_order": float((ours.argmax(1) == plain.argmax(1)).float().mean()),
    }


def _logps(policy: Policy, rows: Rows) -> Tensor:
    """The log-probs of the answers of all pairs, [rows, 2]."""
    (pack,) = policy.packs(rows, list(range(len(rows))))
    with torch.no_grad():
        return policy.score(pack).responses.float().cpu().view(-1, 2)


def memory() -> Iterator[JsonObject]:
    """Activations in bytes a token: counted as the tensors that a pass keeps, measured, and estimated."""
    config, layer = shapes.model().config, shapes.model().model.layers[0]
    linears = tuple(
        Linear(name.rpartition(".")[2], module.out_features, module.in_features, config.num_hidden_layers)
        for name, module in layer.named_modules()
        if hasattr(module, "out_features")
    )
    others = 2 * config.vocab_size * config.hidden_size
    shape = Shape(
        config.hidden_size, config.num_hidden_layers, config.vocab_size, config.max_position_embeddings, linears, others
    )
    policy = adapted()
    try:
        rows = _rows(512 if shapes.dry else policy.packing.budget - 256, 128, 64)
        pack = next(policy.packs(rows, list(range(len(rows)))))
        yield {"counted_bytes_per_token": activation_bytes(policy, pack) / pack.slots}
        yield {"measured_bytes_per_token": measured(_step(policy, rows))["activation_bytes"] / pack.slots}
    finally:
        release(policy)
    settings = MemorySettings(16, "all-linear", "nf4", "adamw", recompute=False, batch_tokens=8192, longest_row=256)
    estimated = estimate(shape, settings, "cuda", None)
    yield {"estimated_bytes_per_token": (estimated.activations + estimated.temporary) / 8192}


def scaling() -> Iterator[JsonObject]:
    """Steps of several lengths and pack sizes."""
    lengths = ((64, 32),) if shapes.dry else ((256, 128), (1024, 256), (4096, 512), (128, 1024))
    for prompt, response in lengths:
        for budget in (1024,) if shapes.dry else (4096, 8192, 16_384, 32_768):
            policy = adapted()
            policy.packing = replace(policy.packing, budget=budget)
            name = f"prompt {prompt}, answers {response}, packs of {budget}"
            try:
                yield {name: _figures(policy, _rows(2 * budget, prompt, response))}
            except (torch.OutOfMemoryError, UserError) as error:
                yield {name: {"error": str(error)[:300]}}
            finally:
                release(policy)
                shapes.free()


def sampling() -> Iterator[JsonObject]:
    """Tokens a second of this engine's sampling and of transformers' generate, over the same prompts."""
    prompts, samples, length = (2, 2, 8) if shapes.dry else (16, 4, 128)
    policy = adapted()
    try:
        settings = Sampling(max_tokens=length, seed=0)
        texts = [random_row(number, 64, 4).prompt for number in range(prompts)]
        batch = [CompletionRequest(row, k, text) for row, text in enumerate(texts) for k in range(samples)]
        seconds = seconds_of(lambda: list(sample(policy, batch, settings, frozenset())), 2)
        yield {"tokens_per_second": len(batch) * length / seconds}
        ids = torch.tensor([request.prompt for request in batch], device=DEVICE)

        def generate() -> None:
            with policy.own_attention_in_use(), torch.no_grad(), policy.autocast():
                policy.causal.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=length,
                    min_new_tokens=length, pad_token_id=1,
                )  # fmt: skip

        yield {"generate_tokens_per_second": len(batch) * length / seconds_of(generate, 2)}
    finally:
        release(policy)
