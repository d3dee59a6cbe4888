"""LoRA layers that compute the same as PEFT's in fewer passes over memory.

y = W x + s · B A x (Hu et al. 2021, Eq. 3). PEFT computes the second term separately, scales it and adds it. That
takes three tensors as large as the output, in the forward and in the backward pass. Under autocast it also casts x to
float32 and back. Here B A x is accumulated into the output of the base layer, and the backward pass is four small
matrix products. The modules are subclasses of PEFT's, registered in its configuration, so adapters are saved and
loaded by PEFT.
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
        low = x @ a.to(x.dtype).t()  # (n, r)
        output.addmm_(low.to(output.dtype), b.to(output.dtype).t(), alpha=scaling)
        ctx.mark_dirty(output)
        ctx.save_for_backward(x, low, a, b)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        grad_low = (grad @ b.to(grad.dtype)).mul_(ctx.scaling)  # (n, r)
        grad_x = grad_low.to(x.dtype) @ a.to(x.dtype) if ctx.needs_input_grad[1] else None  # (n, in)
        grad_a = (grad_low.t() @ x.to(grad_low.dtype)).to(a.dtype)  # (r, in)
        grad_b = (low.to(grad.dtype).t() @ grad).t().mul(ctx.scaling).to(b.dtype)  # (out, r)
        return grad, grad_x, grad_a, grad_b, None


class _AddsDelta:
    """The `forward` of the LoRA layers below. As a mixin it comes before PEFT's own."""

    def forward(self: lora.LoraLayer, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or not self._is_plain(names[0]):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        a, b = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
        # Two dimensions: with three, a quantised layer with a bias returns a view, which must not change in place.
        flat = x.flatten(0, -2)
        output = self.base_layer(flat)
        output = _AddDelta.apply(output, flat.to(output.dtype), a, b, self.scaling[names[0]])  # type: ignore[no-untyped-call]
        return output.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]

    def _is_plain(self: lora.LoraLayer, name: str) -> bool:
        """Whether adapter `name` is just two matrices: no DoRA, no active dropout, no bias."""
        dropout = self.lora_dropout[name]
        active = isinstance(dropout, nn.Dropout) and dropout.training
        return not active and name not in self.lora_variant and self.lora_B[name].bias is None


class LoraLinear(_AddsDelta, lora.Linear):  # type: ignore[misc]
    """LoRA on an ordinary linear layer."""


class LoraLinear4bit(_AddsDelta, lora.Linear4bit):  # type: ignore[misc]
    """LoRA on a 4-bit linear layer."""


class LoraLinear8bit(_AddsDelta, lora.Linear8bitLt):  # type: ignore[misc]
    """LoRA on an 8-bit linear layer."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        # On a CPU, PEFT's DoRA moves the base weight to the device where it is. bitsandbytes then takes it for a new
        # weight, and its next forward pass would replace the scales by those of the new weight, which has none.
        weight = self.base_layer.weight
        if weight.CB is not None and weight.SCB is None:
            weight.CB = None
        return super().forward(x, *args, **kwargs)


def with_fast_layers(config: LoraConfig) -> LoraConfig:
    """`config` with the LoRA layers of this module. PEFT's own layers serve every other kind of base layer."""
    config._register_custom_module({Linear4bit: LoraLinear4bit, Linear8bitLt: LoraLinear8bit, nn.Linear: LoraLinear})
    return config
