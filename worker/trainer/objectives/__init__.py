"""Objectives: pure functions from log-probabilities to losses, each with its paper and equation.

The function of a loss has the name of its record in `app/spec/losses.py`.
"""

from types import ModuleType

import torch
from torch import Tensor

from app.spec.hyperparameters import DPOHyperparameters
from app.spec.losses import LOSSES
from worker.trainer.objectives import distribution, preference, reference_free
from worker.trainer.objectives.batch import Batch, Objective

MODULES: tuple[ModuleType, ...] = (preference, distribution, reference_free)


def objective(name: str) -> Objective:
    """The function of the loss `name`."""
    found: list[Objective] = [getattr(module, name) for module in MODULES if hasattr(module, name)]
    if len(found) != 1:
        raise LookupError(f"worker/trainer/objectives needs one function '{name}' and has {len(found)}.")
    return found[0]


OBJECTIVES = {name: objective(name) for name in LOSSES}
"""By the name that the job spec gives."""


def rewards_of(batch: Batch, settings: DPOHyperparameters) -> Tensor:
    """The rewards that the job's loss compares, [B, K].

    For DPO they are β log(π/π_ref) (Rafailov et al. 2023, Eq. 5), with another divergence β f′(π/π_ref), and without
    a reference β log π. They are averaged over the answer's tokens where the loss does that. The rewards of a sum of
    losses are the mean of its terms' rewards by their weights, whatever their order. Likelihood alone (`sft`) compares
    nothing: it has no part, unless there is nothing else.
    """
    if settings.rewards:
        return batch.policy
    terms = [term for term in settings.losses if term.name != "sft"] or settings.losses
    total = sum(term.weight for term in terms)
    rewards = torch.zeros_like(batch.policy)
    for term in terms:
        loss = LOSSES[term.name]
        options = loss.options_of(settings)
        scores = batch.scores(options) if loss.reference else batch.policy
        if loss.averaged and options.ipo_length_average:
            scores = scores / batch.lengths.clamp(min=1)
        rewards = rewards + (term.weight / total) * options.beta * scores
    return rewards


def losses_of(batch: Batch, settings: DPOHyperparameters) -> Tensor:
    """The job's weighted sum of losses, [B]; with WPO (arXiv:2406.11827, Eq. 2) each pair by its weight."""
    terms = [
        term.weight * OBJECTIVES[term.name](batch, LOSSES[term.name].options_of(settings)) for term in settings.losses
    ]
    losses = torch.stack(terms).sum(0)
    if batch.alignment is not None:
        losses = losses * torch.exp(batch.alignment.detach()).prod(1)
    return losses
