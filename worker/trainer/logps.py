"""Log-probabilities of tokens from hidden states, with only a chunk of the logits in memory at a time.

All logits of B·T positions and a vocabulary of V would be B·T·V numbers. Only the N positions that predict a scored
token go through the head, one chunk after the other.

The gradient with respect to a hidden state is ∂ log p(y)/∂h = (onehot(y) − softmax(z)) W, times ∂L/∂ log p(y). Only
the backward pass knows this last factor, which is one number for each token. The product with W needs nothing but the
softmax, so the forward pass computes it. A frozen head then costs two matrix products for each token, not three, and
no logits are recomputed.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from worker.trainer.hardware import hardware, wide_product
from worker.trainer.packing import LEAST_ROWS


@dataclass(frozen=True)
class Head:
    """The output head: z = c · tanh(scale · (W h + b) / c), or z = scale · (W h + b) if the cap c is None.

    `weight` W [V, H], `bias` b [V] or None, `softcap` c.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """The head of a transformers model, with the scale and the cap of its configuration."""
        config, layer = model.config.get_text_config(), model.get_output_embeddings()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        return cls(layer.weight, getattr(layer, "bias", None), scale, getattr(config, "final_logit_softcapping", None))

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits z [n, V] in `dtype` from `hidden` [n, H].

        A GPU accumulates a 16-bit product in `dtype`. A CPU computes it in the weight's dtype and casts it.
        """
        hidden = hidden.to(self.weight.dtype)
        if hardware(hidden.device).half and hidden.dtype != dtype:
            logits = wide_product(hidden, self.weight.t(), dtype)
            logits = logits if self.bias is None else logits.add_(self.bias)
        else:
            logits = torch.nn.functional.linear(hidden, self.weight, self.bias).to(dtype)
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backward_(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """∂L/∂(W h + b) from `gradient` = ∂L/∂z [n, V], in place. A head with a cap needs its `logits` z."""
        if self.softcap is not None and logits is not None:
            gradient.mul_(1 - (logits / self.softcap) ** 2)  # tanh' = 1 − tanh²
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


@dataclass(frozen=True)
class TokenScores:
    """Scores of N tokens, each [N].

    `logps`: log p(y), differentiable. `correct`: whether the token has the largest logit. The others are on request.
    `entropy`: of the predicted distribution, in nats. `alignment`: log p(y) − log Σ_v p(v)², for the weights of WPO
    (Zhou et al. 2024, Eq. 2). `values`: by a value head, of the text before the token; differentiable.
    """

    logps: Tensor
    correct: Tensor
    entropy: Tensor | None = None
    alignment: Tensor | None = None
    values: Tensor | None = None


def score_tokens(
    hidden: Tensor, head: Head, targets: Tensor, *, entropy: bool = False, alignment: bool = False
) -> TokenScores:
    """Score the tokens `targets` [N], predicted from `hidden` [N, H]. Log-probs are float32 or wider.

    Differentiable in `hidden`, and in the head's weight and bias if they require a gradient.
    """
    count = len(targets)
    if count < LEAST_ROWS:
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, LEAST_ROWS - count))
        targets = torch.nn.functional.pad(targets, (0, LEAST_ROWS - count))
    # Autocast is off here: it would change the dtypes that the caller chose and the float32 sums.
    with torch.autocast(hidden.device.type, enabled=False):
        logps, correct, *extras = _TokenLogps.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, targets, head, entropy, alignment
        )
    entropies, alignments = extras
    return TokenScores(
        logps[:count],
        correct[:count],
        entropies[:count] if entropy else None,
        alignments[:count] if alignment else None,
    )


def score_logits(logits: Tensor, targets: Tensor, *, entropy: bool = False, alignment: bool = False) -> TokenScores:
    """Score the tokens `targets` [N] from the model's own `logits` [N, V]: slower, and exact for every head."""
    with torch.autocast(logits.device.type, enabled=False):
        all_logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)  # (N, V)
        logps = all_logps.gather(1, targets[:, None]).squeeze(1)
        detached = all_logps.detach()
        correct = logps.detach() == detached.amax(-1)
        return TokenScores(
            logps,
            correct,
            -(detached.exp() * detached).nan_to_num(0.0).sum(-1) if entropy else None,  # 0 · log 0 counts as 0
            logps.detach() - (2 * detached).logsumexp(-1) if alignment else None,
        )


class _TokenLogps(torch.autograd.Function):
    """`score_tokens` for autograd: all fields of `TokenScores`, the last two empty unless requested."""

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
        jacobian = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # ∂ log p(y)/∂h, (N, H)
        for chunk in chunks(weight, count):
            logits, target = head.logits(hidden[chunk], dtype), targets[chunk, None]  # (n, V), (n, 1)
            copy = logits.clone() if entropy or (jacobian is not None and head.softcap is not None) else None
            largest = logits.amax(-1, keepdim=True)
            chosen = logits.gather(1, target)
            correct[chunk] = (chosen == largest).squeeze(1)
            # log p(y) = z_y − log Σ exp(z), with the largest z subtracted for stability.
            weights = logits.sub_(largest).exp_()  # in place: the chunk is the largest tensor in memory
            total = weights.sum(-1, keepdim=True)
            normaliser = total.log() + largest
            logps[chunk] = (chosen - normaliser).squeeze(1)
            if copy is not None and entropy:
                # Entropy: log Σ exp(z) − Σ p z.
                entropies[chunk] = normaliser.squeeze(1) - (weights * copy).sum(-1) / total.squeeze(1)
            if alignment:
                alignments[chunk] = logps[chunk] - (weights.square().sum(-1) / total.squeeze(1).square()).log()
            if jacobian is not None:
                gradient = weights.div_(-total)  # −softmax(z)
                gradient.scatter_add_(1, target, torch.ones_like(chosen))  # + onehot(y)
                jacobian[chunk] = head.backward_(gradient, copy).to(weight.dtype) @ weight
        saved = (hidden, weight, targets) if any(ctx.needs_input_grad[1:3]) else (None, None, None)
        ctx.save_for_backward(jacobian, *saved)
        ctx.head, ctx.dtype = head, dtype
        ctx.mark_non_differentiable(correct, entropies, alignments)
        return logps, correct, entropies, alignments

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        jacobian, hidden, weight, targets = ctx.saved_tensors
        grad_hidden = None if jacobian is None else (jacobian * grad[:, None]).to(jacobian.dtype)  # (N, H)
        grad_weight = grad_bias = None
        if hidden is not None:
            # The head trains. Its gradient sums over tokens with the weights `grad`, which the forward pass lacked:
            # recompute the logits.
            grad_weight = torch.zeros_like(weight, dtype=ctx.dtype) if ctx.needs_input_grad[1] else None  # (V, H)
            grad_bias = torch.zeros(len(weight), dtype=ctx.dtype, device=weight.device)  # (V,)
            for chunk in chunks(weight, len(targets)):
                logits = ctx.head.logits(hidden[chunk], ctx.dtype)
                gradient = logits.softmax(-1).neg_()
                gradient.scatter_add_(1, targets[chunk, None], torch.ones_like(gradient[:, :1]))
                gradient = ctx.head.backward_(gradient, logits).mul_(grad[chunk, None])
                if grad_weight is not None:
                    grad_weight += gradient.T @ hidden[chunk].to(ctx.dtype)
                grad_bias += gradient.sum(0)
            grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
            grad_bias = grad_bias.to(weight.dtype) if ctx.needs_input_grad[2] else None
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def chunks(weight: Tensor, count: int) -> list[slice]:
    """Slices of `count` tokens, each with at most the device's `head_logits` under the head `weight` [V, H].

    They are of equal length, ± 1, because a product of fewer than `LEAST_ROWS` rows can have other bits.
    """
    size = max(2 * LEAST_ROWS, hardware(weight.device).head_logits // len(weight))
    number = -(-count // size)  # rounded up
    ends = [k * count // number for k in range(number + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]
