"""Model FLOPs utilisation: the arithmetic that a step needs, over what the device can do at its best.

Needed are 2 FLOPs for each weight that a token passes, and as many again for the gradient to the activations; a
third time where the weights train. The head counts at scored positions only; attention, the adapter, and whatever
is computed twice do not count at all.
"""

import time
from functools import cache
from typing import Any

import torch

from worker.trainer.model import Policy


def layer_weights(causal: Any) -> int:
    """Weights of the linear layers that every token passes: no embeddings, no head, no adapter."""
    head, found = {id(module) for module in causal.get_output_embeddings().modules()}, 0
    for name, module in causal.named_modules():
        if id(module) in head or "lora_" in name:
            continue
        if hasattr(module, "in_features") and hasattr(module, "out_features") and not hasattr(module, "base_layer"):
            found += module.in_features * module.out_features
        elif type(module).__name__ == "Conv1D":  # GPT-2's linear layer
            found += module.nx * module.nf
    return found


def needed_flops(policy: Policy, layers: int, tokens: int, scored: int) -> float:
    """FLOPs of a training step over `tokens` distinct tokens, `scored` of which are predicted.

    `layers` is what `layer_weights` counts, which walks over the whole model.
    """
    passes = 6 if policy.full else 4
    head = policy.causal.get_output_embeddings().weight
    return float(passes * (layers * tokens + head.numel() * scored))


@cache
def peak_flops(device: torch.device) -> float:
    """FLOP/s of a large matrix product on `device`, measured: in bfloat16 on a GPU, in float32 on a CPU."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.full((size, size), 0.5, device=device, dtype=dtype) for _ in range(2))  # no draw of the run's seed
    best = float("inf")
    for _ in range(5):
        if cuda:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
