"""LoRA layers that compute what PEFT's do in fewer passes over memory.

y = W x + s · B A x (Hu et al. 2021, Eq. 3). PEFT computes the second term by itself, scales it and adds it: three
tensors as large as the output, forward and backward, and under autocast it casts x to float32 and back. Here B A x is
accumulated into the output that the base layer made, and backward four small products are all there is. The modules
are PEFT's, subclassed and registered through its configuration, so that adapters are saved and loaded as ever.
"""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn


class _AddDelta(torch.autograd.Function):
    """`output` + scaling · x Aᵀ Bᵀ, in place. Shapes: output [n, out], x [n, in], A [r, in], B [out, r]."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        low = x @ a.to(x.dtype).t()
        output.addmm_(low.to(output.dtype), b.to(output.dtype).t(), alpha=scaling)
        ctx.mark_dirty(output)
        ctx.save_for_backward(x, low, a, b)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        grad_low = (grad @ b.to(grad.dtype)).mul_(ctx.scaling)
        grad_x = grad_low.to(x.dtype) @ a.to(x.dtype) if ctx.needs_input_grad[1] else None
        grad_a = (grad_low.t() @ x.to(grad_low.dtype)).to(a.dtype)
        grad_b = (low.to(grad.dtype).t() @ grad).t().mul(ctx.scaling).to(b.dtype)
        return grad, grad_x, grad_a, grad_b, None


class _AddsDelta:
    """What the LoRA layers below share: `forward`, mixed in before PEFT's own."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or not self._is_plain(names[0]):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        a, b = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
        flat = x.flatten(0, -2)  # of three dimensions, a quantised layer with a bias gives a view, which stays as it is
        output = self.base_layer(flat)
        output = _AddDelta.apply(output, flat.to(output.dtype), a, b, self.scaling[names[0]])  # type: ignore[no-untyped-call]
        return output.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]

    def _is_plain(self: Any, name: str) -> bool:
        """Whether adapter `name` is nothing but two matrices: no DoRA, no dropout that acts, no bias."""
        dropout = self.lora_dropout[name]
        acts = isinstance(dropout, nn.Dropout) and dropout.training
        return not acts and name not in self.lora_variant and self.lora_B[name].bias is None


class LoraLinear(_AddsDelta, lora.Linear):  # type: ignore[misc]
    """LoRA on an ordinary linear layer."""


class LoraLinear4bit(_AddsDelta, lora.Linear4bit):  # type: ignore[misc]
    """LoRA on a linear layer in four bits."""


class LoraLinear8bit(_AddsDelta, lora.Linear8bitLt):  # type: ignore[misc]
    """LoRA on a linear layer in eight bits."""


def with_fast_layers(config: LoraConfig) -> LoraConfig:
    """`config`, with the layers of this module for the base layers they know; PEFT has others for the rest."""
    config._register_custom_module({Linear4bit: LoraLinear4bit, Linear8bitLt: LoraLinear8bit, nn.Linear: LoraLinear})
    return config
