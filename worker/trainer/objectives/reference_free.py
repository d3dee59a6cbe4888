"""Losses over the policy alone."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from app.jobs.hyperparameters import DPOHyperparameters
from worker.trainer.objectives.batch import Batch, smoothed
from worker.trainer.objectives.preference import beta_of


def sft(batch: Batch, _settings: DPOHyperparameters) -> Tensor:
    """Negative log-likelihood of the preferred answer; its mean over the step is the mean over the step's tokens."""
    return -batch.policy[:, 0] / batch.mean_length


def simpo(batch: Batch, settings: DPOHyperparameters) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, Eq. 6): −log σ(β (log π(y_w)/|y_w| − log π(y_l)/|y_l|) − γ)."""
    beta, means = beta_of(settings), batch.policy / batch.lengths.clamp(min=1)
    gamma = beta / 2 if settings.simpo_gamma is None else settings.simpo_gamma
    return -logsigmoid(beta * (means[:, 0] - means[:, 1]) - gamma)


def orpo(batch: Batch, settings: DPOHyperparameters) -> Tensor:
    """ORPO (Hong et al. 2024, arXiv:2403.07691, Eq. 6 and 7): L_SFT − λ log σ(log odds(y_w)/odds(y_l)), λ = β.

    odds(y) = P(y)/(1 − P(y)) with the length-averaged log P. L_SFT is over the answer alone, as in the paper; TRL's
    is over the prompt too.
    """
    means = batch.policy / batch.lengths.clamp(min=1)
    odds = means - _log1mexp(means)
    return sft(batch, settings) - beta_of(settings) * logsigmoid(odds[:, 0] - odds[:, 1])


def _log1mexp(logps: Tensor) -> Tensor:
    """log(1 − exp(x)) for x < 0, exact near 0 and far from it; x = 0 counts as the largest value below."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    near = logps > -0.693  # each side of where keeps its gradient finite by staying on its own branch
    small = torch.log(-torch.expm1(torch.where(near, logps, -0.5)))
    return torch.where(near, small, torch.log1p(-torch.exp(torch.where(near, -1.0, logps))))


def cpo(batch: Batch, settings: DPOHyperparameters) -> Tensor:
    """CPO (Xu et al. 2024, arXiv:2401.08417, Eq. 3 to 5): DPO with a uniform reference, and the likelihood term."""
    logits = beta_of(settings) * (batch.policy[:, 0] - batch.policy[:, 1])
    weight = 1.0 if settings.cpo_alpha is None else settings.cpo_alpha
    return smoothed(logits, settings.label_smoothing or 0.0) + weight * sft(batch, settings)


def unlikelihood(batch: Batch, settings: DPOHyperparameters) -> Tensor:
    """The DPO paper's baseline (Sec. 6): −log π(y_w) + α log π(y_l), the gradient without its weight.

    It has no lower bound and degenerates, which is what the paper shows with it.
    """
    alpha = 0.1 if settings.unlikelihood_alpha is None else settings.unlikelihood_alpha
    return -batch.policy[:, 0] + alpha * batch.policy[:, 1]


def bradley_terry(batch: Batch, _settings: DPOHyperparameters) -> Tensor:
    """The reward model's loss (Rafailov et al. 2023, Eq. 2): −log σ(r_w − r_l). `policy` holds rewards here."""
    return -logsigmoid(batch.policy[:, 0] - batch.policy[:, 1])
