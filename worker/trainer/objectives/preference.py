"""Losses over the implicit rewards r̂ = β log(π/π_ref) of a pair, or of a ranked list."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from app.spec.losses import LossOptions
from worker.trainer.objectives.batch import Batch, smoothed

ABSENT = -1e30
"""The reward of a response that a shorter list lacks: finite, so that no gradient is NaN."""


def sigmoid(batch: Batch, options: LossOptions) -> Tensor:
    """DPO (Rafailov et al. 2023, Eq. 7): −log σ(r̂_w − r̂_l).

    Its gradient is −β σ(r̂_l − r̂_w) [∇log π(y_w) − ∇log π(y_l)]. With label smoothing it is cDPO (Mitchell 2023).
    """
    return smoothed(options.beta * batch.margins(options), options.label_smoothing)


def hinge(batch: Batch, options: LossOptions) -> Tensor:
    """SLiC's hinge (Zhao et al. 2023, arXiv:2305.10425) on the implicit rewards: max(0, 1 − (r̂_w − r̂_l))."""
    return relu(1 - options.beta * batch.margins(options))


def ipo(batch: Batch, options: LossOptions) -> Tensor:
    """IPO (Azar et al. 2023, arXiv:2310.12036, Eq. 17): (h − 1/(2β))², h the difference of the log-ratios.

    By default each log-ratio is averaged over its tokens, as in the paper's experiments (its authors confirmed
    it to TRL's); `ipo_length_average: false` sums, as the equation reads.
    """
    scores = batch.scores(options)
    if options.ipo_length_average:
        scores = scores / batch.lengths.clamp(min=1)
    return (scores[:, 0] - scores[:, 1] - 1 / (2 * options.beta)) ** 2


def robust(batch: Batch, options: LossOptions) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409, Eq. 12): unbiased where a share ε of labels is flipped."""
    logits, epsilon = options.beta * batch.margins(options), options.label_smoothing
    return (epsilon * logsigmoid(-logits) - (1 - epsilon) * logsigmoid(logits)) / (1 - 2 * epsilon)


def exo_pair(batch: Batch, options: LossOptions) -> Tensor:
    """EXO (Ji et al. 2024, arXiv:2402.00856, Eq. 16) for K = 2: KL(p_θ ‖ p_r), p_θ = σ(±z), p_r = (1 − ε, ε)."""
    logits = options.beta * batch.margins(options)
    epsilon = options.label_smoothing
    chosen = torch.sigmoid(logits) * (logsigmoid(logits) - math.log1p(-epsilon))
    return chosen + torch.sigmoid(-logits) * (logsigmoid(-logits) - math.log(epsilon))


def nca_pair(batch: Batch, options: LossOptions) -> Tensor:
    """NCA (Chen et al. 2024, arXiv:2402.05369, Eq. 6) for a pair: −log σ(r̂_w) − ½ Σ log σ(−r̂)."""
    rewards = options.beta * batch.logratios
    return -logsigmoid(rewards[:, 0]) - 0.5 * logsigmoid(-rewards).sum(1)


def bco_pair(batch: Batch, options: LossOptions) -> Tensor:
    """BCO (Jung et al. 2024, arXiv:2404.04656, Eq. 10) on pairs: −log σ(r̂_w − δ) − log σ(−(r̂_l − δ)).

    The shift δ = ½ (E[r̂_w] + E[r̂_l]) is taken over the step's batch, without gradient: a running mean, which the
    paper also has, would make a step depend on the steps before it. TRL 1.16 drops δ; with δ = 0 this is its loss.
    """
    rewards = options.beta * batch.logratios
    shifted = rewards - rewards.detach().mean()
    return -logsigmoid(shifted[:, 0]) - logsigmoid(-shifted[:, 1])


def sppo_hard(batch: Batch, options: LossOptions) -> Tensor:
    """SPPO (Wu et al. 2024, arXiv:2405.00675, Eq. 4.7) with P = 1 for the winner and 0 for the loser."""
    target = 0.5 / options.beta
    return (batch.chosen - target) ** 2 + (batch.rejected + target) ** 2


def apo_zero(batch: Batch, options: LossOptions) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7): for chosen answers better than the model's."""
    beta = options.beta
    return 1 - torch.sigmoid(beta * batch.chosen) + torch.sigmoid(beta * batch.rejected)


def apo_down(batch: Batch, options: LossOptions) -> Tensor:
    """APO-down (the same, Eq. 8): for chosen answers worse than the model's."""
    beta = options.beta
    return torch.sigmoid(beta * batch.chosen) + 1 - torch.sigmoid(beta * (batch.chosen - batch.rejected))


def discopop(batch: Batch, options: LossOptions) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (Lu et al. 2024, arXiv:2406.08414, Eq. 5); τ is 0.05 by default."""
    logits = options.beta * batch.margins(options)
    tau = options.discopop_tau
    share = torch.sigmoid(logits / tau)
    # σ(z/τ) exp(−z) in one exponent: alone, the second factor overflows where the first is 0.
    return -(1 - share) * logsigmoid(logits) + torch.exp(logsigmoid(logits / tau) - logits)


def sigmoid_norm(batch: Batch, options: LossOptions) -> Tensor:
    """Length-normalised DPO (Lambert et al. 2024, Tülu 3, arXiv:2411.15124, Eq. 6): scores are averaged over tokens."""
    scores = batch.scores(options) / batch.lengths.clamp(min=1)
    return -logsigmoid(options.beta * (scores[:, 0] - scores[:, 1]))


def plackett_luce(batch: Batch, options: LossOptions) -> Tensor:
    """Plackett–Luce over a ranking (Rafailov et al. 2023, App. A.3, Eq. 20): −Σ_k [r̂_k − log Σ_{j≥k} exp r̂_j].

    With K = 2 it is DPO's loss.
    """
    rewards = (options.beta * batch.logratios).masked_fill(~batch.present, ABSENT)
    rest = rewards.flip(1).logcumsumexp(1).flip(1)
    return torch.where(batch.present, rest - rewards, 0.0).sum(1)
