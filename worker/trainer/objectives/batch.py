"""What an objective sees: the log-probs of some rows' responses."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from app.spec.losses import LossOptions
from worker.trainer.objectives.divergences import link


@dataclass(frozen=True)
class Batch:
    """B rows with up to K responses each.

    Shapes: `policy` and `reference` [B, K], log π(y|x) and log π_ref(y|x), the preferred response first;
    `lengths` [B, K], scored tokens; `present` [B, K], false where a row has fewer responses; `desirable` [B], of
    labelled rows; `alignment` [B, K], how likely the policy is to write each response (WPO, Eq. 2), where the job
    asks for it. `mean_length` is the mean number of chosen tokens over the whole optimizer step, of which these
    rows may be a part. A loss without a reference sees `reference` zero. With LD-DPO the tokens of a tail count less
    in `policy` and `reference`, and `plain` has both as the models say them.
    """

    policy: Tensor
    reference: Tensor
    lengths: Tensor
    present: Tensor
    desirable: Tensor
    mean_length: float
    alignment: Tensor | None = None
    plain: tuple[Tensor, Tensor] | None = None

    @property
    def logps(self) -> tuple[Tensor, Tensor]:
        """log π(y|x) and log π_ref(y|x) as the models say them, [B, K]."""
        return self.plain or (self.policy, self.reference)

    @property
    def logratios(self) -> Tensor:
        """log(π(y|x) / π_ref(y|x)), [B, K]."""
        return self.policy - self.reference

    @property
    def chosen(self) -> Tensor:
        """The log-ratio of the preferred response, [B]."""
        return self.logratios[:, 0]

    @property
    def rejected(self) -> Tensor:
        """The log-ratio of the other one, [B]."""
        return self.logratios[:, 1]

    def scores(self, options: LossOptions) -> Tensor:
        """f′(π/π_ref) of the job's f-divergence, [B, K]: the log-ratio for the reverse KL divergence."""
        return link(self.logratios, options.f_divergence, options.f_alpha)

    def margins(self, options: LossOptions) -> Tensor:
        """The chosen response's score less the rejected one's, [B]; times β it is the margin of the rewards."""
        scores = self.scores(options)
        return scores[:, 0] - scores[:, 1]


Objective = Callable[[Batch, LossOptions], Tensor]
"""(rows, options with every default filled in) → the loss of each row, [B]."""


def smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """−(1 − ε) log σ(z) − ε log σ(−z): binary cross-entropy with a share ε of wrong labels."""
    losses = -(1 - label_smoothing) * torch.nn.functional.logsigmoid(logits)
    return losses - label_smoothing * torch.nn.functional.logsigmoid(-logits)
