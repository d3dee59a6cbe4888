"""Products of a frozen base in FP8: x and W have 8 bits a number, and sums have 32 (Micikevicius et al. 2022).

The format is e4m3: four bits of exponent, three of mantissa. Each row of x and of W is divided by a scale of its own.
So the largest number of a row becomes the largest one of the format. The gradient of the activations is a product of
the same kind. Recent GPUs compute it about twice as fast as one in bfloat16.

The weights have 8 bits from the start. Policy, reference and evaluations compute with the same ones.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = torch.float8_e4m3fn
DIVISOR = 16
"""Kernels need sizes that are multiples of it. Layers of other sizes stay as they are."""
CAPABILITY = (8, 9)
"""The first GPUs with such products: Ada and Hopper."""


def why_unusable(device: torch.device) -> str | None:
    """The reason why `device` has no products in FP8; None if it has."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"the GPU '{torch.cuda.get_device_name(device)}' has no products in FP8"
    return None


class Fp8Linear(nn.Linear):
    """A frozen linear layer, x Wᵀ + b.

    `weight` [out, in] has the bits of W in FP8, and `scales` [out] are those of its rows.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        values, scales = rounded(layer.weight.detach())
        # As plain bytes, because PEFT gives an adapter the dtype of floating-point weights.
        self.weight = nn.Parameter(values.view(torch.uint8), requires_grad=False)
        self.scales = nn.Parameter(scales.flatten(), requires_grad=False)
        self.bias = layer.bias
        self.training = layer.training
        for part in (self, self.weight, self.scales):
            setattr(part, "_is_hf_initialized", True)  # noqa: B010 - else transformers would draw new weights

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of autocast or else of x."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        output: Tensor = _Product.apply(x.flatten(0, -2), self.weight.view(FORMAT), self.scales)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            output = output + self.bias.to(output.dtype)
        return output if x.dim() == 2 else output.view(*x.shape[:-1], -1)  # a view must not change in place


class _Product(torch.autograd.Function):
    """x Wᵀ for x [n, in], `weight` W [out, in] in FP8, and its `scales` [out]: [n, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scales)
        values, x_scales = rounded(x)
        return torch._scaled_mm(values, weight.t(), x_scales, scales[None], out_dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, scales = ctx.saved_tensors
        # W's scales are those of the gradient's columns here, so they go into the gradient.
        values, grad_scales = rounded(grad.float() * scales)
        columns = weight.t().contiguous().t()  # kernels read the second factor column by column
        ones = torch.ones(1, weight.shape[1], device=grad.device)
        return torch._scaled_mm(values, columns, grad_scales, ones, out_dtype=grad.dtype), None, None


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values [n, k] in FP8, scales [n, 1] in float32) whose product is about `x` [n, k]."""
    x = x.contiguous()  # GPUs read the first factor row by row
    largest = x.abs().amax(1, keepdim=True).float()
    # A row may be zero. The compiler takes numbers from `finfo` for constants, and those of a module for variables.
    scales = (largest / torch.finfo(FORMAT).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scales).to(FORMAT), scales


def convert(layer: nn.Module, name: str, kept: Collection[str]) -> None:
    """Let the linear layers inside of `layer`, which has the `name` in its model, compute in FP8.

    Those with the names `kept`, whose weights other code reads, stay as they are.
    """
    for path, module in list(layer.named_modules()):
        fits = type(module) is nn.Linear and module.in_features % DIVISOR == module.out_features % DIVISOR == 0
        if fits and path and f"{name}.{path}" not in kept:
            layer.set_submodule(path, Fp8Linear(module))


def is_used(model: nn.Module) -> bool:
    """Whether any layer of `model` computes in FP8."""
    return any(isinstance(module, Fp8Linear) for module in model.modules())
