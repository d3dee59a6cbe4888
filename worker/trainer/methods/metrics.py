"""The metrics of a preference stage. They have TRL's names where TRL has the metric."""

from dataclasses import replace

import torch
from torch import Tensor

from app.spec.datasets.example import Kind
from app.spec.hyperparameters import DPOHyperparameters
from worker.trainer.averages import Averages
from worker.trainer.objectives import losses_of, rewards_of
from worker.trainer.objectives.batch import Batch


def report(batch: Batch, losses: Tensor, settings: DPOHyperparameters, averages: Averages) -> None:
    """Add the metrics of the rows of `batch` to `averages`. `losses` are the losses of the rows, [B]."""
    averages.add("loss", losses.detach())
    weights = gradient_weights(batch, settings)
    with torch.no_grad():
        rewards, (logps, reference) = rewards_of(batch, settings), batch.logps
        logratios = logps - reference
        if settings.data == Kind.LABELLED:
            _report_labelled(batch, rewards, weights, averages)
            return
        averages.add("gradient_weight", weights)
        last = batch.present.sum(1, keepdim=True) - 1  # column of the worst response, [B, 1]
        sides = {"chosen": torch.zeros_like(last), "rejected": last}
        for side, column in sides.items():
            averages.add(f"rewards/{side}", rewards.gather(1, column))
            if not settings.rewards:
                averages.add(f"logps/{side}", logps.gather(1, column))
            if settings.needs_reference:
                averages.add(f"logratios/{side}", logratios.gather(1, column))
        margins = rewards[:, :1] - rewards.gather(1, last)  # [B, 1]
        better = rewards[:, :, None] > rewards[:, None, :]  # [B, K, K]
        # The pairs (i, j) of a ranking with i < j: response i is preferred to response j.
        ordered = (batch.present[:, :, None] & batch.present[:, None, :]).triu(1)
        averages.add("rewards/margins", margins)
        # 1 if the longer answer has the higher reward, 0 if the shorter one has it, ½ at a tie.
        longer = (batch.lengths[:, :1] - batch.lengths.gather(1, last)) * margins
        averages.add("rewards/longer_preferred", (longer.sign() + 1) / 2)
        averages.add("rewards/accuracies", better[ordered].float())


def _report_labelled(batch: Batch, rewards: Tensor, weights: Tensor, averages: Averages) -> None:
    """The metrics of labelled rows (KTO). An answer counts as preferred if its log-ratio exceeds the KL estimate."""
    divergence = batch.rejected.mean().clamp(min=0)
    averages.add("kl", divergence)
    averages.add("gradient_weight", weights)
    for side, rows in (("chosen", batch.desirable), ("rejected", ~batch.desirable)):
        averages.add(f"rewards/{side}", rewards[rows, 0])
        averages.add(f"logps/{side}", batch.policy[rows, 0])
        averages.add(f"logratios/{side}", batch.chosen[rows])
    averages.add("rewards/accuracies", ((batch.chosen > divergence) == batch.desirable).float())


def gradient_weights(batch: Batch, settings: DPOHyperparameters) -> Tensor:
    """The weight of each row in the gradient, [B]: −∂L/∂(r_w − r_l), the fall of the loss as the reward margin rises.

    For DPO it is σ(r̂_l − r̂_w) (Rafailov et al. 2023, Sec. 4), minus ε with label smoothing. Autograd computes it as
    ½ (∂L/∂r_l − ∂L/∂r_w), where ∂L/∂r = (∂L/∂log π) / (∂r/∂log π). y_l is the last response of a ranking. For a
    labelled row it is −∂L/∂r if the response is desirable, else ∂L/∂r.
    """
    with torch.enable_grad():
        policy = batch.policy.detach().requires_grad_()
        differentiable = replace(batch, policy=policy)
        (slopes,) = torch.autograd.grad(rewards_of(differentiable, settings).sum(), policy)  # ∂r/∂log π, [B, K]
        (gradient,) = torch.autograd.grad(losses_of(differentiable, settings).sum(), policy)  # ∂L/∂log π, [B, K]
    by_reward = torch.where(slopes != 0, gradient / slopes, 0.0)  # ∂L/∂r, [B, K]
    if settings.data == Kind.LABELLED:
        return torch.where(batch.desirable, -by_reward[:, 0], by_reward[:, 0])
    last = batch.present.sum(1, keepdim=True) - 1
    return (by_reward.gather(1, last)[:, 0] - by_reward[:, 0]) / 2
