"""Losses over the policy alone."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from app.spec.losses import LossOptions
from worker.trainer.objectives.batch import Batch, smoothed


def sft(batch: Batch, _options: LossOptions) -> Tensor:
    """Negative log-likelihood of the preferred answer; its mean over the step is the mean over the step's tokens."""
    return -batch.policy[:, 0] / batch.mean_length


def simpo(batch: Batch, options: LossOptions) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, Eq. 6): −log σ(β (log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ)."""
    beta, means = options.beta, batch.policy / batch.lengths.clamp(min=1)
    gamma = options.simpo_gamma
    return -logsigmoid(beta * (means[:, 0] - means[:, 1]) - gamma)


def orpo(batch: Batch, options: LossOptions) -> Tensor:
    """ORPO (Hong et al. 2024, arXiv:2403.07691, Eq. 6 and 7): L_SFT − λ log σ(log odds(y_w)/odds(y_l)), λ = β.

    odds(y) = P(y)/(1 − P(y)) with the length-averaged log P. L_SFT is over the answer alone, as in the paper; TRL's
    is over the prompt too.
    """
    means = batch.policy / batch.lengths.clamp(min=1)
    odds = means - _log1mexp(means)
    return sft(batch, options) - options.beta * logsigmoid(odds[:, 0] - odds[:, 1])


def _log1mexp(logps: Tensor) -> Tensor:
    """log(1 − exp(x)) for x < 0, exact near 0 and far from it; x = 0 counts as the largest value below."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    near = logps > -0.693  # each side of where keeps its gradient finite by staying on its own branch
    small = torch.log(-torch.expm1(torch.where(near, logps, -0.5)))
    return torch.where(near, small, torch.log1p(-torch.exp(torch.where(near, -1.0, logps))))


def cpo(batch: Batch, options: LossOptions) -> Tensor:
    """CPO (Xu et al. 2024, arXiv:2401.08417, Eq. 3 to 5): DPO with a uniform reference, and the likelihood term."""
    logits = options.beta * (batch.policy[:, 0] - batch.policy[:, 1])
    weight = options.cpo_alpha
    return smoothed(logits, options.label_smoothing) + weight * sft(batch, options)


def unlikelihood(batch: Batch, options: LossOptions) -> Tensor:
    """The DPO paper's baseline (Sec. 6): −log π(y_w) + α log π(y_l), the gradient without its weight.

    It has no lower bound and degenerates, which is what the paper shows with it.
    """
    alpha = options.unlikelihood_alpha
    return -batch.policy[:, 0] + alpha * batch.policy[:, 1]


def reward_model(batch: Batch, _options: LossOptions) -> Tensor:
    """The reward model's loss (Rafailov et al. 2023, Eq. 2): −log σ(r_w − r_l). `policy` holds rewards here."""
    return -logsigmoid(batch.policy[:, 0] - batch.policy[:, 1])
