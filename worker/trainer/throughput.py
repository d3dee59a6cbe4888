"""Model FLOPs utilisation (MFU): the FLOPs that a step needs, divided by the peak FLOPs of the device.

Each weight needs 2 FLOPs a token in the forward pass and 2 for the gradient of the activations. A trained weight
needs 2 more for its own gradient. The head counts only at scored positions. Attention, the adapter and recomputed
activations do not count.
"""

import time
from functools import cache

import torch
from transformers import PreTrainedModel

from worker.trainer.model import Policy


def layer_weights(causal: PreTrainedModel) -> int:
    """Number of weights in the linear layers that every token passes, without embeddings, head and adapter."""
    head, count = {id(module) for module in causal.get_output_embeddings().modules()}, 0
    for name, module in causal.named_modules():
        if id(module) in head or "lora_" in name:
            continue
        if hasattr(module, "in_features") and hasattr(module, "out_features") and not hasattr(module, "base_layer"):
            count += module.in_features * module.out_features
        elif type(module).__name__ == "Conv1D":  # GPT-2's linear layer
            count += module.nx * module.nf
    return count


def needed_flops(policy: Policy, layers: int, tokens: int, scored: int) -> float:
    """FLOPs of a training step over `tokens` distinct tokens, `scored` of which are scored.

    `layers` is the result of `layer_weights`, which is slow because it visits every module.
    """
    passes = 6 if policy.full else 4  # FLOPs for each weight and token
    head = policy.causal.get_output_embeddings().weight
    return float(passes * (layers * tokens + head.numel() * scored))


@cache
def peak_flops(device: torch.device) -> float:
    """Measured FLOP/s of a large matrix product on `device`: in bfloat16 on a GPU, in float32 on a CPU."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    # Constants: random numbers would advance the generator of the run.
    a, b = (torch.full((size, size), 0.5, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")  # seconds
    for _ in range(5):
        if cuda:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
