"""Losses on the implicit rewards r̂ = β log(π/π_ref) of a pair or of a ranked list.

r̂_w is the reward of the chosen answer, r̂_l that of the rejected one. With another f-divergence than the reverse KL,
r̂ = β f′(π/π_ref) in the losses that read `f_divergence`. z = r̂_w − r̂_l is the reward margin. All losses are [B].
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from app.spec.losses import LossOptions
from worker.trainer.objectives.batch import Batch, smoothed

ABSENT = -1e30
"""The reward of a response that a shorter list lacks. It is finite, so that no gradient becomes NaN."""


def sigmoid(batch: Batch, options: LossOptions) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, Eq. 7): −log σ(r̂_w − r̂_l).

    Its gradient is −β σ(r̂_l − r̂_w) [∇log π(y_w) − ∇log π(y_l)] (Sec. 4). With label smoothing it is cDPO (Mitchell
    2023).
    """
    return smoothed(options.beta * batch.margins(options), options.label_smoothing)


def hinge(batch: Batch, options: LossOptions) -> Tensor:
    """SLiC's hinge loss (Zhao et al. 2023, arXiv:2305.10425) on the implicit rewards: max(0, 1 − (r̂_w − r̂_l))."""
    return relu(1 - options.beta * batch.margins(options))


def ipo(batch: Batch, options: LossOptions) -> Tensor:
    """IPO (Azar et al. 2023, arXiv:2310.12036, Eq. 17): (h − 1/(2β))², where h is the difference of the log-ratios.

    By default each log-ratio is averaged over its tokens. The paper's experiments do so, as its authors confirmed to
    TRL's. With `ipo_length_average: false` it is summed, as the equation is written.
    """
    scores = batch.scores(options)
    if options.ipo_length_average:
        scores = scores / batch.lengths.clamp(min=1)
    return (scores[:, 0] - scores[:, 1] - 1 / (2 * options.beta)) ** 2


def robust(batch: Batch, options: LossOptions) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409, Eq. 12): unbiased if a share ε of labels is flipped.

    (ε log σ(−z) − (1 − ε) log σ(z)) / (1 − 2ε).
    """
    logits, epsilon = options.beta * batch.margins(options), options.label_smoothing
    return (epsilon * logsigmoid(-logits) - (1 - epsilon) * logsigmoid(logits)) / (1 - 2 * epsilon)


def exo_pair(batch: Batch, options: LossOptions) -> Tensor:
    """EXO (Ji et al. 2024, arXiv:2402.00856, Eq. 16) for K = 2: KL(p_θ ‖ p_r), p_θ = σ(±z), p_r = (1 − ε, ε)."""
    logits = options.beta * batch.margins(options)
    epsilon = options.label_smoothing
    chosen = torch.sigmoid(logits) * (logsigmoid(logits) - math.log1p(-epsilon))
    return chosen + torch.sigmoid(-logits) * (logsigmoid(-logits) - math.log(epsilon))


def nca_pair(batch: Batch, options: LossOptions) -> Tensor:
    """NCA (Chen et al. 2024, arXiv:2402.05369, Eq. 6) for a pair: −log σ(r̂_w) − ½ [log σ(−r̂_w) + log σ(−r̂_l)]."""
    rewards = options.beta * batch.logratios  # [B, 2]
    return -logsigmoid(rewards[:, 0]) - 0.5 * logsigmoid(-rewards).sum(1)


def bco_pair(batch: Batch, options: LossOptions) -> Tensor:
    """BCO (Jung et al. 2024, arXiv:2404.04656, Eq. 10) on pairs: −log σ(r̂_w − δ) − log σ(−(r̂_l − δ)).

    The shift δ = ½ (E[r̂_w] + E[r̂_l]) is the mean over the batch of the step, without gradient. The paper also takes
    a running mean, which would make a step depend on the steps before it. TRL 1.16 drops δ: its loss is this one with
    δ = 0.
    """
    rewards = options.beta * batch.logratios  # [B, 2]
    shifted = rewards - rewards.detach().mean()
    return -logsigmoid(shifted[:, 0]) - logsigmoid(-shifted[:, 1])


def sppo_hard(batch: Batch, options: LossOptions) -> Tensor:
    """SPPO (Wu et al. 2024, arXiv:2405.00675, Eq. 4.7), with P = 1 for the winner and 0 for the loser.

    With the log-ratios ρ = log(π/π_ref): (ρ_w − 1/(2β))² + (ρ_l + 1/(2β))².
    """
    target = 0.5 / options.beta
    return (batch.chosen - target) ** 2 + (batch.rejected + target) ** 2


def apo_zero(batch: Batch, options: LossOptions) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7): 1 − σ(r̂_w) + σ(r̂_l).

    For chosen answers that are better than the model's own.
    """
    beta = options.beta
    return 1 - torch.sigmoid(beta * batch.chosen) + torch.sigmoid(beta * batch.rejected)


def apo_down(batch: Batch, options: LossOptions) -> Tensor:
    """APO-down (D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8): σ(r̂_w) + 1 − σ(r̂_w − r̂_l).

    For chosen answers that are worse than the model's own.
    """
    beta = options.beta
    return torch.sigmoid(beta * batch.chosen) + 1 - torch.sigmoid(beta * (batch.chosen - batch.rejected))


def discopop(batch: Batch, options: LossOptions) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (Lu et al. 2024, arXiv:2406.08414, Eq. 5).

    −(1 − σ(z/τ)) log σ(z) + σ(z/τ) exp(−z), by default with τ = 0.05.
    """
    logits = options.beta * batch.margins(options)
    tau = options.discopop_tau
    share = torch.sigmoid(logits / tau)
    # σ(z/τ) exp(−z) = exp(log σ(z/τ) − z). As a product, exp(−z) could overflow while σ(z/τ) is 0.
    return -(1 - share) * logsigmoid(logits) + torch.exp(logsigmoid(logits / tau) - logits)


def sigmoid_norm(batch: Batch, options: LossOptions) -> Tensor:
    """Length-normalised DPO (Lambert et al. 2024, Tülu 3, arXiv:2411.15124, Eq. 6).

    −log σ(β [score(y_w)/|y_w| − score(y_l)/|y_l|]): each score is averaged over the answer's tokens.
    """
    scores = batch.scores(options) / batch.lengths.clamp(min=1)
    return -logsigmoid(options.beta * (scores[:, 0] - scores[:, 1]))


def plackett_luce(batch: Batch, options: LossOptions) -> Tensor:
    """Plackett–Luce (Rafailov et al. 2023, arXiv:2305.18290, App. A.3, Eq. 20): −Σ_k [r̂_k − log Σ_{j≥k} exp r̂_j].

    For a ranking of K answers, the best first. With K = 2 it is DPO's loss.
    """
    rewards = (options.beta * batch.logratios).masked_fill(~batch.present, ABSENT)  # [B, K]
    rest = rewards.flip(1).logcumsumexp(1).flip(1)  # log Σ_{j≥k} exp r̂_j, [B, K]
    return torch.where(batch.present, rest - rewards, 0.0).sum(1)
