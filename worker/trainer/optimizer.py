"""The optimizers that a job can ask for."""

from collections.abc import Iterable

import torch
from torch import nn

from app.spec.hyperparameters import Hyperparameters

NEED_GPU = {"adamw_8bit", "paged_adamw_8bit"}


def make_optimizer(settings: Hyperparameters, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer `settings.optimizer`; its learning rate is set at each step.

    AdamW (Loshchilov & Hutter 2017) with β = (0.9, 0.999) and ε = 1e-8, in full precision or with 8-bit moments
    (Dettmers et al. 2022); RMSprop with α = 0.99, the DPO paper's.
    """
    chosen, decay = list(parameters), settings.weight_decay
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(chosen, lr=0.0, alpha=0.99, eps=1e-8, weight_decay=decay)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(chosen, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    import bitsandbytes.optim

    kind = bitsandbytes.optim.PagedAdamW8bit if settings.optimizer.startswith("paged") else bitsandbytes.optim.AdamW8bit
    made: torch.optim.Optimizer = kind(chosen, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    return made
