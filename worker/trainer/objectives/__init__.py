"""Objectives: pure functions from log-probabilities to losses, each with its paper and equation.

A loss function has the name of its record in `app/spec/losses.py`. Notation, as in the DPO paper: π is the policy,
π_ref the reference and x the prompt. y_w is the chosen answer, y_l the rejected one. σ is the logistic function.
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
    """The function of the loss `name`. Raises `LookupError` unless exactly one module has it."""
    functions: list[Objective] = [getattr(module, name) for module in MODULES if hasattr(module, name)]
    if len(functions) != 1:
        raise LookupError(f"worker/trainer/objectives needs one function '{name}' and has {len(functions)}.")
    return functions[0]


OBJECTIVES = {name: objective(name) for name in LOSSES}
"""The function of each loss, by its name in the job spec."""


def rewards_of(batch: Batch, settings: DPOHyperparameters) -> Tensor:
    """The rewards that the job's loss compares, [B, K].

    - With a reference: β log(π/π_ref) (Rafailov et al. 2023, Eq. 5); with another f-divergence, β f′(π/π_ref).
    - Without a reference: β log π.
    - Divided by the answer's number of tokens if the loss averages over tokens.
    - For a reward model: its rewards.

    A sum of losses has the weighted mean of its terms' rewards. The likelihood term `sft` compares nothing, so it is
    left out unless it is the only term.
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
    """The job's weighted sum of losses for each row, [B].

    With WPO (Zhou et al. 2024, arXiv:2406.11827, Eq. 2), a pair is weighted by w(x, y_w) · w(x, y_l), without gradient.
    """
    terms = [
        term.weight * OBJECTIVES[term.name](batch, LOSSES[term.name].options_of(settings)) for term in settings.losses
    ]
    losses = torch.stack(terms).sum(0)
    if batch.alignment is not None:
        losses = losses * torch.exp(batch.alignment.detach()).prod(1)  # w = exp(alignment)
    return losses
