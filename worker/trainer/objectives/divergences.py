"""f-divergences that hold the policy to the reference (Wang et al. 2023, arXiv:2309.16240)."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MAX_EXPONENT = 40.0
"""exp of it, squared, is still a float32."""


def link(logratios: Tensor, name: str, alpha: float) -> Tensor:
    """f′(u) at u = π/π_ref, up to a constant so that f′(1) = 0 (their Table 1): what DPO compares in place of log u.

    reverse_kl: log u. forward_kl: 1 − 1/u. js_divergence: log(2u/(1 + u)). alpha_divergence: (1 − u^−α)/α, which
    goes to log u as α goes to 0. Exponents are cut off at 40.
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
