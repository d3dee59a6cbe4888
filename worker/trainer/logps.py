"""Log-probabilities of tokens from hidden states, without ever holding more than a chunk of logits.

A batch of B·T positions and a vocabulary of V would need B·T·V numbers; here only the N positions that predict a
scored token reach the head, a chunk of them at a time. The gradient to a hidden state is
∂ log p(y)/∂h = (onehot(y) − softmax(z)) W, times the gradient of the loss to that log-prob, a number that only the
backward pass knows; the product with W is made in the forward pass, from the softmax that is there anyway. So a
frozen head costs two matrix products a token, not three, and the logits are never made again.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits that exist at a time, by device: 16 MB stay in a CPU's cache, 256 MB keep a GPU busy."""


@dataclass(frozen=True)
class Head:
    """The output head: z = c · tanh(scale · (W h + b) / c), without the cap where `softcap` is None.

    `weight` [V, H], `bias` [V] or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> "Head":
        """The head of a transformers model, with what its configuration says is done to the logits."""
        config, layer = model.config.get_text_config(), model.get_output_embeddings()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        return cls(layer.weight, getattr(layer, "bias", None), scale, getattr(config, "final_logit_softcapping", None))

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """[n, V] in `dtype`, accumulated in it, from `hidden` [n, H]."""
        hidden = hidden.to(self.weight.dtype)
        if hidden.device.type == "cuda" and hidden.dtype != dtype:
            logits = torch.mm(hidden, self.weight.t(), out_dtype=dtype)
            logits = logits if self.bias is None else logits.add_(self.bias)
        else:
            logits = torch.nn.functional.linear(hidden, self.weight, self.bias).to(dtype)
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def slope_(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """∂L/∂(W h + b) from `gradient` = ∂L/∂z, in place. A head with a cap needs its `logits`."""
        if self.softcap is not None and logits is not None:
            gradient.mul_(1 - (logits / self.softcap) ** 2)
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


@dataclass(frozen=True)
class TokenScores:
    """Of N scored tokens, each [N]: `logps`, differentiable; `correct`, whether it is the likeliest token; and where
    they were asked for `entropy`, of the predicted distribution, and `alignment`, log p(y) − log Σ_v p(v)²."""

    logps: Tensor
    correct: Tensor
    entropy: Tensor | None = None
    alignment: Tensor | None = None


def score_tokens(
    hidden: Tensor, head: Head, targets: Tensor, *, entropy: bool = False, alignment: bool = False
) -> TokenScores:
    """Score the tokens `targets` [N], predicted from `hidden` [N, H]. Log-probs are float32 or wider.

    Differentiable in `hidden`, and in the head's weight and bias where they require it.
    """
    # Autocast is off inside: the dtypes here are the caller's, and the sums are float32.
    with torch.autocast(hidden.device.type, enabled=False):
        logps, correct, *extras = _TokenLogps.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, targets, head, entropy, alignment
        )
    return TokenScores(logps, correct, extras[0] if entropy else None, extras[1] if alignment else None)


def score_logits(logits: Tensor, targets: Tensor, *, entropy: bool = False, alignment: bool = False) -> TokenScores:
    """The same from `logits` [N, V] that the model made by itself: slower, and exact for every head."""
    with torch.autocast(logits.device.type, enabled=False):
        every = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        logps = every.gather(1, targets[:, None]).squeeze(1)
        found = every.detach()
        correct = logps.detach() == found.amax(-1)
        return TokenScores(
            logps,
            correct,
            -(found.exp() * found).nan_to_num(0.0).sum(-1) if entropy else None,
            logps.detach() - (2 * found).logsumexp(-1) if alignment else None,
        )


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        entropy: bool,
        alignment: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        count = len(targets)
        logps = torch.empty(count, dtype=dtype, device=hidden.device)
        correct = torch.empty(count, dtype=torch.bool, device=hidden.device)
        entropies = torch.empty(count if entropy else 0, dtype=dtype, device=hidden.device)
        alignments = torch.empty(count if alignment else 0, dtype=dtype, device=hidden.device)
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in parts(weight, count):
            logits, target = head.logits(hidden[part], dtype), targets[part, None]
            keep = logits.clone() if entropy or (jacobian is not None and head.softcap is not None) else None
            largest = logits.amax(-1, keepdim=True)
            chosen = logits.gather(1, target)
            correct[part] = (chosen == largest).squeeze(1)
            weights = logits.sub_(largest).exp_()  # in place: the chunk is the largest tensor there is
            total = weights.sum(-1, keepdim=True)
            normaliser = total.log() + largest
            logps[part] = (chosen - normaliser).squeeze(1)
            if keep is not None and entropy:
                entropies[part] = normaliser.squeeze(1) - (weights * keep).sum(-1) / total.squeeze(1)
            if alignment:
                alignments[part] = logps[part] - (weights.square().sum(-1) / total.squeeze(1).square()).log()
            if jacobian is not None:
                gradient = weights.div_(-total)
                gradient.scatter_add_(1, target, torch.ones_like(chosen))
                jacobian[part] = head.slope_(gradient, keep).to(weight.dtype) @ weight
        saved = (hidden, weight, targets) if any(ctx.needs_input_grad[1:3]) else (None, None, None)
        ctx.save_for_backward(jacobian, *saved)
        ctx.head, ctx.dtype = head, dtype
        ctx.mark_non_differentiable(correct, entropies, alignments)
        return logps, correct, entropies, alignments

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        jacobian, hidden, weight, targets = ctx.saved_tensors
        grad_hidden = None if jacobian is None else (jacobian * grad[:, None]).to(jacobian.dtype)
        grad_weight = grad_bias = None
        if hidden is not None:  # the head trains: its gradient is a sum over tokens, which needs each one's weight
            grad_weight = torch.zeros_like(weight, dtype=ctx.dtype) if ctx.needs_input_grad[1] else None
            grad_bias = torch.zeros(len(weight), dtype=ctx.dtype, device=weight.device)
            for part in parts(weight, len(targets)):
                logits = ctx.head.logits(hidden[part], ctx.dtype)
                gradient = logits.softmax(-1).neg_()
                gradient.scatter_add_(1, targets[part, None], torch.ones_like(gradient[:, :1]))
                gradient = ctx.head.slope_(gradient, logits).mul_(grad[part, None])
                if grad_weight is not None:
                    grad_weight += gradient.T @ hidden[part].to(ctx.dtype)
                grad_bias += gradient.sum(0)
            grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
            grad_bias = grad_bias.to(weight.dtype) if ctx.needs_input_grad[2] else None
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def parts(weight: Tensor, count: int) -> list[slice]:
    """Slices of `count` tokens whose logits, under the head `weight` [V, H], are at most `CHUNK_ELEMENTS` numbers."""
    size = max(1, CHUNK_ELEMENTS[weight.device.type] // len(weight))
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
