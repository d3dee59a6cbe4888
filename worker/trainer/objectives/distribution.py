"""Losses that couple the rows of a batch: they need all its log-probs at once."""

import torch
from torch import Tensor

from app.spec.losses import LossOptions
from worker.trainer.objectives.batch import Batch, smoothed


def aot(batch: Batch, options: LossOptions) -> Tensor:
    """AOT on pairs (Melnyk et al. 2024, arXiv:2406.05882, Eq. 9): the policy's margins should dominate the reference's.

    Both are sorted: the k-th smallest margin of the one is held against the k-th smallest of the other.
    """
    margins = (batch.policy[:, 0] - batch.policy[:, 1]).sort().values
    reference = (batch.reference[:, 0] - batch.reference[:, 1]).sort().values
    return smoothed(options.beta * (margins - reference), options.label_smoothing)


def aot_unpaired(batch: Batch, options: LossOptions) -> Tensor:
    """AOT without pairs (the same, Eq. 8): the chosen log-ratios should dominate the rejected ones."""
    deltas = batch.chosen.sort().values - batch.rejected.sort().values
    return smoothed(options.beta * deltas, options.label_smoothing)


def kto(batch: Batch, options: LossOptions) -> Tensor:
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 8): λ_D (1 − σ(r̂ − z₀)) or λ_U (1 − σ(z₀ − r̂)).

    Column 0 holds each row's answer. Column 1 holds an answer to another prompt: the mean of its log-ratios over
    the batch, at least 0 and without gradient, estimates KL(π‖π_ref), and times β is z₀.
    """
    beta = options.beta
    divergence = batch.rejected.detach().mean().clamp(min=0)
    away = beta * (batch.chosen - divergence)
    good = options.desirable_weight * (1 - torch.sigmoid(away))
    bad = options.undesirable_weight * (1 - torch.sigmoid(-away))
    return torch.where(batch.desirable, good, bad)
