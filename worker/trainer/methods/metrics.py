"""The metrics of a preference stage: TRL's names, and where it has none, ours."""

from dataclasses import replace

import torch
from torch import Tensor

from app.spec.datasets.example import Kind
from app.spec.hyperparameters import DPOHyperparameters
from worker.trainer.averages import Averages
from worker.trainer.objectives import losses_of, rewards_of
from worker.trainer.objectives.batch import Batch


def report(batch: Batch, losses: Tensor, settings: DPOHyperparameters, averages: Averages) -> None:
    """Add the metrics of some rows to `averages`; `losses` [B] are theirs."""
    averages.add("loss", losses.detach())
    weights = gradient_weights(batch, settings)
    with torch.no_grad():
        rewards, (logps, reference) = rewards_of(batch, settings), batch.logps
        logratios = logps - reference
        if settings.data == Kind.LABELLED:
            _report_labelled(batch, rewards, weights, averages)
            return
        averages.add("gradient_weight", weights)
        last = batch.present.sum(1, keepdim=True) - 1
        sides = {"chosen": torch.zeros_like(last), "rejected": last}
        for side, column in sides.items():
            averages.add(f"rewards/{side}", rewards.gather(1, column))
            if not settings.rewards:
                averages.add(f"logps/{side}", logps.gather(1, column))
            if settings.needs_reference:
                averages.add(f"logratios/{side}", logratios.gather(1, column))
        margins = rewards[:, :1] - rewards.gather(1, last)
        better = rewards[:, :, None] > rewards[:, None, :]
        ordered = (batch.present[:, :, None] & batch.present[:, None, :]).triu(1)
        averages.add("rewards/margins", margins)
        longer = (batch.lengths[:, :1] - batch.lengths.gather(1, last)) * margins
        averages.add("rewards/longer_preferred", (longer.sign() + 1) / 2)
        averages.add("rewards/accuracies", better[ordered].float())


def _report_labelled(batch: Batch, rewards: Tensor, weights: Tensor, averages: Averages) -> None:
    divergence = batch.rejected.mean().clamp(min=0)
    averages.add("kl", divergence)
    averages.add("gradient_weight", weights)
    for side, rows in (("chosen", batch.desirable), ("rejected", ~batch.desirable)):
        averages.add(f"rewards/{side}", rewards[rows, 0])
        averages.add(f"logps/{side}", batch.policy[rows, 0])
        averages.add(f"logratios/{side}", batch.chosen[rows])
    averages.add("rewards/accuracies", ((batch.chosen > divergence) == batch.desirable).float())


def gradient_weights(batch: Batch, settings: DPOHyperparameters) -> Tensor:
    """How strongly each row still teaches, [B]: the fall of its loss for a rise of its reward margin, −∂L/∂(r_w − r_l).

    For DPO it is σ(r̂_l − r̂_w), the weight in the gradient of its loss (Rafailov et al. 2023, Sec. 4), less ε with
    label smoothing. It is found from the loss itself: half of what the best and the worst response get, each by its
    reward's slope. A labelled row has one response, whose reward is to rise or to fall.
    """
    with torch.enable_grad():
        policy = batch.policy.detach().requires_grad_()
        seen = replace(batch, policy=policy)
        (slopes,) = torch.autograd.grad(rewards_of(seen, settings).sum(), policy)
        (gradient,) = torch.autograd.grad(losses_of(seen, settings).sum(), policy)
    by_reward = torch.where(slopes != 0, gradient / slopes, 0.0)
    if settings.data == Kind.LABELLED:
        return torch.where(batch.desirable, -by_reward[:, 0], by_reward[:, 0])
    last = batch.present.sum(1, keepdim=True) - 1
    return (by_reward.gather(1, last)[:, 0] - by_reward[:, 0]) / 2
