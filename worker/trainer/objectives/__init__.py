"""Objectives: pure functions from log-probabilities to losses, each with its paper and equation.

Whoever adds one writes a function here, adds its name to `LOSSES` below, and what it needs to `app/jobs/losses.py`.
"""

import torch
from torch import Tensor

from app.jobs.hyperparameters import DPOHyperparameters
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


def losses_of(batch: Batch, settings: DPOHyperparameters) -> Tensor:
    """The job's weighted sum of losses, [B]; with WPO (arXiv:2406.11827, Eq. 2) each pair by its weight."""
    terms = [term.weight * LOSSES[term.name](batch, settings) for term in settings.losses]
    losses = torch.stack(terms).sum(0)
    if batch.alignment is not None:
        losses = losses * torch.exp(batch.alignment.detach()).prod(1)
    return losses
