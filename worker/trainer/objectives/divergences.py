"""f-divergences that keep the policy close to the reference (Wang et al. 2023, arXiv:2309.16240)."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MAX_EXPONENT = 40.0
"""Exponents are clamped to it: even exp(40)² is finite in float32."""


def link(logratios: Tensor, name: str, alpha: float) -> Tensor:
    """f′(u) at u = π/π_ref (Table 1), shifted so that f′(1) = 0. DPO with an f-divergence uses it in place of log u.

    - `reverse_kl`: log u
    - `forward_kl`: 1 − 1/u
    - `js_divergence`: log(2u/(1 + u))
    - `alpha_divergence`: (1 − u^−α)/α, which tends to log u as α tends to 0

    Takes log u in any shape. Returns f′(u) in the same shape.
    """
    if name == "forward_kl":
        return 1 - _exp(-logratios)
    if name == "js_divergence":
        return math.log(2) + logsigmoid(logratios)
    if name == "alpha_divergence":
        return (1 - _exp(-alpha * logratios)) / alpha
    return logratios


def _exp(exponents: Tensor) -> Tensor:
    return torch.exp(exponents.clamp(max=MAX_EXPONENT))
