"""Losses that couple the rows of a batch. They need all log-probs of an optimizer step at once."""

import torch
from torch import Tensor

from app.spec.losses import LossOptions
from worker.trainer.objectives.batch import Batch, smoothed


def aot(batch: Batch, options: LossOptions) -> Tensor:
    """AOT on pairs (Melnyk et al. 2024, arXiv:2406.05882, Eq. 9): −log σ(β (m₍ₖ₎ − m_ref₍ₖ₎)).

    m = log π(y_w) − log π(y_l) are the policy's margins and m_ref the reference's. Both are sorted: the k-th smallest
    margin of the policy should exceed the k-th smallest of the reference. [B], in sorted order.
    """
    margins = (batch.policy[:, 0] - batch.policy[:, 1]).sort().values
    reference = (batch.reference[:, 0] - batch.reference[:, 1]).sort().values
    return smoothed(options.beta * (margins - reference), options.label_smoothing)


def aot_unpaired(batch: Batch, options: LossOptions) -> Tensor:
    """AOT without pairs (Melnyk et al. 2024, arXiv:2406.05882, Eq. 8), on sorted log-ratios. [B], in sorted order.

    The k-th smallest log-ratio of the chosen answers should exceed the k-th smallest of the rejected answers.
    """
    deltas = batch.chosen.sort().values - batch.rejected.sort().values
    return smoothed(options.beta * deltas, options.label_smoothing)


def kto(batch: Batch, options: LossOptions) -> Tensor:
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 8): λ_D (1 − σ(r̂ − z₀)) or λ_U (1 − σ(z₀ − r̂)).

    Column 0 holds the answer of each row. Column 1 holds an answer to another prompt. z₀ = β KL(π‖π_ref). The
    KL estimate is the mean of column 1's log-ratios over the batch, at least 0 and without gradient.
    """
    beta = options.beta
    divergence = batch.rejected.detach().mean().clamp(min=0)  # KL estimate, in nats
    away = beta * (batch.chosen - divergence)  # r̂ − z₀
    good = options.desirable_weight * (1 - torch.sigmoid(away))
    bad = options.undesirable_weight * (1 - torch.sigmoid(-away))
    return torch.where(batch.desirable, good, bad)
