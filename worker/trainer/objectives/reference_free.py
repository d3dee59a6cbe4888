"""Losses on the log-probs of the policy alone, without a reference. All losses are [B]."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from app.spec.losses import LossOptions
from worker.trainer.objectives.batch import Batch, smoothed


def sft(batch: Batch, _options: LossOptions) -> Tensor:
    """Negative log-likelihood of the chosen answer: −log π(y_w) / mean |y_w|.

    The division makes its mean over the rows of a step the mean over the step's tokens.
    """
    return -batch.policy[:, 0] / batch.mean_length


def simpo(batch: Batch, options: LossOptions) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, Eq. 6): −log σ(β (log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ)."""
    beta, means = options.beta, batch.policy / batch.lengths.clamp(min=1)  # nats per token, [B, 2]
    gamma = options.simpo_gamma
    return -logsigmoid(beta * (means[:, 0] - means[:, 1]) - gamma)


def orpo(batch: Batch, options: LossOptions) -> Tensor:
    """ORPO (Hong et al. 2024, arXiv:2403.07691, Eq. 6 and 7): L_SFT − λ log σ(log [odds(y_w)/odds(y_l)]) with λ = β.

    odds(y) = P(y)/(1 − P(y)), where log P(y) is averaged over tokens. L_SFT covers the answer alone, as in the paper.
    TRL's covers the prompt too.
    """
    means = batch.policy / batch.lengths.clamp(min=1)  # log P(y), [B, 2]
    log_odds = means - _log1mexp(means)
    return sft(batch, options) - options.beta * logsigmoid(log_odds[:, 0] - log_odds[:, 1])


def _log1mexp(logps: Tensor) -> Tensor:
    """log(1 − exp(x)) for x ≤ 0, accurate near 0 and far from it. x is clamped to −eps, since log 0 is infinite."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    # Near 0: log(−expm1(x)); else log1p(−exp(x)). Each branch gets a harmless x where the other one is used.
    # `where` would pass on a NaN gradient even from the branch that it does not take.
    near = logps > -0.693  # −log 2
    small = torch.log(-torch.expm1(torch.where(near, logps, -0.5)))
    return torch.where(near, small, torch.log1p(-torch.exp(torch.where(near, -1.0, logps))))


def cpo(batch: Batch, options: LossOptions) -> Tensor:
    """CPO (Xu et al. 2024, arXiv:2401.08417, Eq. 3 to 5): DPO with a uniform reference, plus likelihood.

    −log σ(β [log π(y_w) − log π(y_l)]) + α L_SFT.
    """
    logits = options.beta * (batch.policy[:, 0] - batch.policy[:, 1])
    weight = options.cpo_alpha
    return smoothed(logits, options.label_smoothing) + weight * sft(batch, options)


def unlikelihood(batch: Batch, options: LossOptions) -> Tensor:
    """Unlikelihood (Rafailov et al. 2023, arXiv:2305.18290, Sec. 6), the paper's baseline: −log π(y_w) + α log π(y_l).

    With α = 1 its gradient is DPO's without the factor β σ(r̂_l − r̂_w). It has no lower bound: the paper shows that
    the policy degenerates.
    """
    alpha = options.unlikelihood_alpha
    return -batch.policy[:, 0] + alpha * batch.policy[:, 1]


def reward_model(batch: Batch, _options: LossOptions) -> Tensor:
    """Bradley–Terry loss of a reward model (Rafailov et al. 2023, arXiv:2305.18290, Eq. 2): −log σ(r_w − r_l).

    `batch.policy` holds the rewards r.
    """
    return -logsigmoid(batch.policy[:, 0] - batch.policy[:, 1])
