"""LoRA layers that compute the same as PEFT's in fewer passes over memory.

y = W x + s · B A x (Hu et al. 2021, Eq. 3). PEFT computes the second term separately, scales it and adds it. That
takes three tensors as large as the output, in the forward and in the backward pass. Under autocast it also casts x to
float32 and back. Here B A x is accumulated into the output of the base layer, and the backward pass is four small
matrix products. In packs on a GPU, most layers in NF4 have B A x within their product (see `extended`). The modules are
subclasses of PEFT's, registered in its configuration, so adapters are saved and loaded by PEFT.

The gradients of A and B are products over the tokens of a pack, one for each segment (see `gradients`).
"""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from worker.trainer.extended import Group
from worker.trainer.gradients import Views, segment_products, views_of
from worker.trainer.shards import unit_of


class _AddDelta(torch.autograd.Function):
    """`output` + scaling · x Aᵀ Bᵀ, in place. Shapes: output [n, out], x [n, in], A [S, r, in], B [S, out, r].

    A and B are the same matrices for each of S segments. `ends` [S]: where each segment ends in n (see `Views`).
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, all_a: Tensor, all_b: Tensor, ends: Tensor | None, scaling: float
    ) -> Tensor:
        a, b = all_a[0], all_b[0]
        low = x @ a.to(x.dtype).t()  # (n, r)
        output.addmm_(low.to(output.dtype), b.to(output.dtype).t(), alpha=scaling)
        ctx.mark_dirty(output)
        ctx.save_for_backward(x, low, a, b, ends)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b, ends = ctx.saved_tensors
        grad_low = (grad @ b.to(grad.dtype)).mul_(ctx.scaling)  # (n, r)
        grad_x = grad_low.to(x.dtype) @ a.to(x.dtype) if ctx.needs_input_grad[1] else None  # (n, in)
        grad_a = segment_products(grad_low, x.to(grad_low.dtype), ends, a.dtype)  # (S, r, in)
        grad_b = segment_products(grad, low.to(grad.dtype) * ctx.scaling, ends, b.dtype)  # (S, out, r)
        return grad, grad_x, grad_a, grad_b, None, None


class RewardHead(nn.Linear):
    """A head with one output, w · h: the reward of each response, or the value of each token."""

    views: Views | None = None

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        super().__init__(hidden_size, 1, bias=False, device=device, dtype=torch.float32)

    def forward(self, last: Tensor) -> Tensor:
        """The rewards [R] of responses with the hidden states `last` [R, H] at their last tokens."""
        (weight,), ends = views_of(self, self.weight)
        rewards: Tensor = _Rewards.apply(last.to(self.weight.dtype), weight, ends)  # type: ignore[no-untyped-call]
        return rewards


class _Rewards(torch.autograd.Function):
    """w · h for each row h of `last` [R, H] and `weight` w [S, 1, H]: [R]. Each row by itself, whatever the others are.

    w is the same for each of S segments. `ends` [S]: where each segment ends in R (see `Views`).
    """

    @staticmethod
    def forward(ctx: Any, last: Tensor, weight: Tensor, ends: Tensor | None) -> Tensor:
        ctx.save_for_backward(last, weight[0], ends)
        return (last * weight[0]).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        last, weight, ends = ctx.saved_tensors
        return grad[:, None] * weight, segment_products(grad[:, None], last, ends, weight.dtype), None


class AddsDelta:
    """The `forward` of the LoRA layers below. As a mixin it comes before PEFT's own."""

    views: Views | None = None
    group: Group | None = None
    """The layers that get the same input, if their adapters are within their products (see `extended`)."""

    def forward(self: lora.LoraLayer, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        names = self._active()
        if self.disable_adapters or self.merged or len(names) != 1 or not self._is_plain(names[0]):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        # Two dimensions: with three, a quantised layer with a bias returns a view, which must not change in place.
        flat = x.flatten(0, -2)
        if self.group is not None and self.group.on:
            return self.group.output(self, x).view(*x.shape[:-1], -1)  # type: ignore[no-any-return]
        output = self.base_layer(flat)
        (a, b), ends = views_of(self, self.lora_A[names[0]].weight, self.lora_B[names[0]].weight)
        output = _AddDelta.apply(output, flat.to(output.dtype), a, b, ends, self.scaling[names[0]])  # type: ignore[no-untyped-call]
        return output.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]

    def update_layer(self: lora.LoraLayer, *args: object, config: LoraConfig, **kwargs: object) -> None:
        unit = unit_of(self.get_base_layer())
        if config.use_dora and unit is not None:  # DoRA begins with the norms of the base's weights
            unit.gather()
        super().update_layer(*args, config=config, **kwargs)  # type: ignore[misc]

    def plain_weights(self: lora.LoraLayer) -> tuple[nn.Parameter, ...]:
        """A and B if the layer computes with their views, else nothing."""
        names = self._active()
        if len(names) != 1 or not self._is_plain(names[0]):
            return ()
        return self.lora_A[names[0]].weight, self.lora_B[names[0]].weight

    def scale(self: lora.LoraLayer) -> float:
        """The factor s of the only active adapter."""
        (name,) = self._active()
        return float(self.scaling[name])

    def _active(self: lora.LoraLayer) -> list[str]:
        """The names of the active adapters that this layer has."""
        return [name for name in self.active_adapters if name in self.lora_A]

    def _is_plain(self: lora.LoraLayer, name: str) -> bool:
        """Whether adapter `name` is just two matrices: no DoRA, no active dropout, no bias."""
        dropout = self.lora_dropout[name]
        active = isinstance(dropout, nn.Dropout) and dropout.training
        return not active and name not in self.lora_variant and self.lora_B[name].bias is None


class LoraLinear(AddsDelta, lora.Linear):  # type: ignore[misc]
    """LoRA on an ordinary linear layer."""


class LoraLinear4bit(AddsDelta, lora.Linear4bit):  # type: ignore[misc]
    """LoRA on a 4-bit linear layer."""


class LoraLinear8bit(AddsDelta, lora.Linear8bitLt):  # type: ignore[misc]
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
