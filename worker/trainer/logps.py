"""Log-probabilities of tokens from hidden states, without ever holding more than a chunk of logits.

A batch of B·T positions and a vocabulary of V would need B·T·V numbers; here only the N positions that predict a
scored token reach the head, `CHUNK` of them at a time, in the forward and again in the backward pass.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Logits that exist at a time."""


class _TokenLogps(torch.autograd.Function):
    """log softmax(h Wᵀ + b)[target], with ∂/∂h = (onehot − softmax) W and, where W trains, its gradient too."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logps = torch.empty(len(targets), dtype=dtype, device=hidden.device)
        correct = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
        normalisers = torch.empty_like(logps)
        for part in _parts(len(targets), weight.shape[0]):
            logits = _logits(hidden[part], weight, bias, dtype)
            normalisers[part] = torch.logsumexp(logits, dim=-1)
            logps[part] = logits.gather(1, targets[part, None]).squeeze(1) - normalisers[part]
            correct[part] = logits.argmax(dim=-1) == targets[part]
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.mark_non_differentiable(correct)
        return logps, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _correct: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=normalisers.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=normalisers.dtype) if ctx.needs_input_grad[2] else None
        for part in _parts(len(targets), weight.shape[0]):
            logits = _logits(hidden[part], weight, bias, normalisers.dtype)
            grad_logits = torch.exp(logits - normalisers[part, None]).neg_()
            grad_logits.scatter_add_(1, targets[part, None], torch.ones_like(grad_logits[:, :1]))
            grad_logits *= grad[part, None]
            grad_hidden[part] = grad_logits.to(weight.dtype) @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[part].to(grad_logits.dtype)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None


def _parts(count: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias).to(dtype)


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and whether it is the most likely token.

    Shapes: `hidden` [N, H], `weight` [V, H], `bias` [V] or None, `targets` [N]. Returns ([N] in float32 or wider,
    [N] bool). Differentiable in `hidden`, and in `weight` and `bias` where they require it.
    """
    # Autocast is off inside: the dtypes here are the caller's, and the sums are float32.
    with torch.autocast(hidden.device.type, enabled=False):
        logps, correct = _TokenLogps.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return logps, correct
