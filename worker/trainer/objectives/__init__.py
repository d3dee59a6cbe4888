"""Objectives: pure functions from log-probabilities to losses, each with its paper and equation.

Whoever adds one writes a function here, adds its name to `LOSSES` below, and what it needs to `app/jobs/losses.py`.
"""

import torch
from torch import Tensor

from app.jobs.hyperparameters import DPOHyperparameters
from app.jobs.losses import LOSSES as TERMS
from worker.trainer.objectives import distribution, preference, reference_free
from worker.trainer.objectives.batch import Batch, Objective

LOSSES: dict[str, Objective] = {
    "sigmoid": preference.sigmoid,
    "hinge": preference.hinge,
    "ipo": preference.ipo,
    "robust": preference.robust,
    "exo_pair": preference.exo_pair,
    "nca_pair": preference.nca_pair,
    "bco_pair": preference.bco_pair,
    "sppo_hard": preference.sppo_hard,
    "apo_zero": preference.apo_zero,
    "apo_down": preference.apo_down,
    "discopop": preference.discopop,
    "sigmoid_norm": preference.sigmoid_norm,
    "aot": distribution.aot,
    "aot_unpaired": distribution.aot_unpaired,
    "kto": distribution.kto,
    "plackett_luce": preference.plackett_luce,
    "sft": reference_free.sft,
    "simpo": reference_free.simpo,
    "orpo": reference_free.orpo,
    "cpo": reference_free.cpo,
    "unlikelihood": reference_free.unlikelihood,
    "reward_model": reference_free.bradley_terry,
}
"""By the name that the job spec gives."""


def rewards_of(batch: Batch, settings: DPOHyperparameters) -> Tensor:
    """The rewards that the job's loss compares, [B, K]: β f′(π/π_ref), which is β log(π/π_ref) for DPO (Rafailov et al.
    2023, Eq. 5), averaged over the answer's tokens where the loss does that; β log π without a reference.

    A sum of losses has the mean of its terms' rewards by their weights, whatever their order. Likelihood alone
    (`sft`) compares nothing: it has no part, unless there is nothing else.
    """
    if settings.rewards:
        return batch.policy
    terms = [term for term in settings.losses if term.name != "sft"] or settings.losses
    total = sum(term.weight for term in terms)
    found = torch.zeros_like(batch.policy)
    for term in terms:
        kind = TERMS[term.name]
        scores = batch.scores(settings) if kind.reference else batch.policy
        if kind.length_average and not (term.name == "ipo" and settings.ipo_length_average is False):
            scores = scores / batch.lengths.clamp(min=1)
        found = found + (term.weight / total) * preference.beta_of(settings) * scores
    return found


def losses_of(batch: Batch, settings: DPOHyperparameters) -> Tensor:
    """The job's weighted sum of losses, [B]; with WPO (arXiv:2406.11827, Eq. 2) each pair by its weight."""
    terms = [term.weight * LOSSES[term.name](batch, settings) for term in settings.losses]
    losses = torch.stack(terms).sum(0)
    if batch.alignment is not None:
        losses = losses * torch.exp(batch.alignment.detach()).prod(1)
    return losses
