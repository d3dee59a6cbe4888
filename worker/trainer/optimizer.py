"""The optimizers that a job can choose."""

from collections.abc import Iterable

import torch
from torch import nn

from app.spec.hyperparameters import Hyperparameters

NEED_GPU = {"adamw_8bit", "paged_adamw_8bit"}


def make_optimizer(settings: Hyperparameters, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer `settings.optimizer`. The caller sets its learning rate before each step.

    AdamW (Loshchilov & Hutter 2017) has β = (0.9, 0.999) and ε = 1e-8. Its moments are in full precision or in 8 bits
    (Dettmers et al. 2022). RMSprop has α = 0.99, as in the DPO paper.
    """
    # A group, because torch refuses an empty list: of several ranks, one may own no parameter.
    trained, decay = [{"params": list(parameters)}], settings.weight_decay
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(trained, lr=0.0, alpha=0.99, eps=1e-8, weight_decay=decay)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    import bitsandbytes.optim

    kind = bitsandbytes.optim.PagedAdamW8bit if settings.optimizer.startswith("paged") else bitsandbytes.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(trained, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    return optimizer
