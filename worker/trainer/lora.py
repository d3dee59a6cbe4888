"""LoRA layers that compute the same as PEFT's in fewer passes over memory.

y = W x + s · B A x (Hu et al. 2021, Eq. 3). PEFT computes the second term separately, scales it and adds it. That
takes three tensors as large as the output, in the forward and in the backward pass. Under autocast it also casts x to
float32 and back. Here B A x is accumulated into the output of the base layer, and the backward pass is four small
matrix products. The modules are subclasses of PEFT's, registered in its configuration, so adapters are saved and
loaded by PEFT.

The gradients of A and B are products over the tokens of a pack, one for each segment (see `gradients`).
"""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from worker.trainer.gradients import Products, Target, add_product
from worker.trainer.shards import unit_of


class _AddDelta(torch.autograd.Function):
    """`output` + scaling · x Aᵀ Bᵀ, in place. Shapes: output [n, out], x [n, in], A [r, in], B [out, r].

    With `targets`, the gradients of A and B are added to the sums of the pack's segments, and autograd gets none.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, targets: list[Target] | None
    ) -> Tensor:
        low = x @ a.to(x.dtype).t()  # (n, r)
        output.addmm_(low.to(output.dtype), b.to(output.dtype).t(), alpha=scaling)
        ctx.mark_dirty(output)
        ctx.save_for_backward(x, low, a, b)
        ctx.scaling, ctx.targets, ctx.parameters = scaling, targets, (a, b)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        grad_low = (grad @ b.to(grad.dtype)).mul_(ctx.scaling)  # (n, r)
        grad_x = grad_low.to(x.dtype) @ a.to(x.dtype) if ctx.needs_input_grad[1] else None  # (n, in)
        if ctx.targets is not None:
            wide_x, scaled_low = x.to(grad_low.dtype), low.to(grad.dtype) * ctx.scaling
            for target in ctx.targets:
                add_product(target.sum, ctx.parameters[0], grad_low[target.slots], wide_x[target.slots])  # (r, in)
                add_product(target.sum, ctx.parameters[1], grad[target.slots], scaled_low[target.slots])  # (out, r)
            return grad, grad_x, None, None, None, None
        grad_a = (grad_low.t() @ x.to(grad_low.dtype)).to(a.dtype)  # (r, in)
        grad_b = (low.to(grad.dtype).t() @ grad).t().mul(ctx.scaling).to(b.dtype)  # (out, r)
        return grad, grad_x, grad_a, grad_b, None, None


class RewardHead(nn.Linear):
    """The head of a reward model: the reward of each response, w · h."""

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        super().__init__(hidden_size, 1, bias=False, device=device, dtype=torch.float32)
        self.products = Products()

    def forward(self, last: Tensor) -> Tensor:
        """The rewards [R] of responses with the hidden states `last` [R, H] at their last tokens."""
        rewards: Tensor = _Rewards.apply(last.to(self.weight.dtype), self.weight, self.products.targets)  # type: ignore[no-untyped-call]
        return rewards


class _Rewards(torch.autograd.Function):
    """w · h for each row h of `last` [R, H] and `weight` w [1, H]: [R]. Each row by itself, whatever the others are."""

    @staticmethod
    def forward(ctx: Any, last: Tensor, weight: Tensor, targets: list[Target] | None) -> Tensor:
        ctx.save_for_backward(last, weight)
        ctx.targets, ctx.parameter = targets, weight
        return (last * weight).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        last, weight = ctx.saved_tensors
        grad_last = grad[:, None] * weight  # (R, H)
        if ctx.targets is not None:
            for target in ctx.targets:
                add_product(target.sum, ctx.parameter, grad[target.responses, None], last[target.responses])  # (1, H)
            return grad_last, None, None
        return grad_last, grad[None] @ last, None


class AddsDelta:
    """The `forward` of the LoRA layers below. As a mixin it comes before PEFT's own."""

    products = Products()
    """Shared by all layers of a policy, once it is loaded."""

    def forward(self: lora.LoraLayer, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or not self._is_plain(names[0]):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        a, b = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
        # Two dimensions: with three, a quantised layer with a bias returns a view, which must not change in place.
        flat = x.flatten(0, -2)
        output = self.base_layer(flat)
        targets = self.products.targets
        output = _AddDelta.apply(output, flat.to(output.dtype), a, b, self.scaling[names[0]], targets)  # type: ignore[no-untyped-call]
        return output.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]

    def update_layer(self: lora.LoraLayer, *args: object, config: LoraConfig, **kwargs: object) -> None:
        unit = unit_of(self.get_base_layer())
        if config.use_dora and unit is not None:  # DoRA begins with the norms of the base's weights
            unit.gather()
        super().update_layer(*args, config=config, **kwargs)  # type: ignore[misc]

    def plain_weights(self: lora.LoraLayer) -> set[nn.Parameter]:
        """A and B if the layer adds their products itself, else nothing."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or not self._is_plain(names[0]):
            return set()
        return {self.lora_A[names[0]].weight, self.lora_B[names[0]].weight}

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
