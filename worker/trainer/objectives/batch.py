"""The input of an objective: log-probs of some rows' responses."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from app.spec.losses import LossOptions
from worker.trainer.objectives.divergences import link


@dataclass(frozen=True)
class Batch:
    """B rows with up to K responses each, the preferred response first. All log-probs are in nats."""

    policy: Tensor
    """log π(y|x), [B, K]. For a reward model: the rewards."""
    reference: Tensor
    """log π_ref(y|x), [B, K]; zero for a loss without a reference."""
    lengths: Tensor
    """Number of scored tokens, [B, K]."""
    present: Tensor
    """Whether the row has this response, [B, K]. A ranked list may have fewer than K."""
    desirable: Tensor
    """The labels of labelled rows, [B]."""
    mean_length: float
    """Mean number of scored tokens of the chosen responses of the whole optimizer step, which may have more rows."""
    alignment: Tensor | None = None
    """log w(x, y) of WPO (Eq. 2), [B, K]: how likely the policy is to generate each response. None without WPO."""
    plain: tuple[Tensor, Tensor] | None = None
    """With LD-DPO, `policy` and `reference` down-weight the tail of a response. `plain` has both without it."""

    @property
    def logps(self) -> tuple[Tensor, Tensor]:
        """(log π(y|x), log π_ref(y|x)) as the models give them, each [B, K]."""
        return self.plain or (self.policy, self.reference)

    @property
    def logratios(self) -> Tensor:
        """log(π(y|x) / π_ref(y|x)), [B, K]."""
        return self.policy - self.reference

    @property
    def chosen(self) -> Tensor:
        """The log-ratio of the preferred response, log(π(y_w|x) / π_ref(y_w|x)), [B]."""
        return self.logratios[:, 0]

    @property
    def rejected(self) -> Tensor:
        """The log-ratio of the second response, log(π(y_l|x) / π_ref(y_l|x)), [B]."""
        return self.logratios[:, 1]

    def scores(self, options: LossOptions) -> Tensor:
        """f′(π/π_ref) of the job's f-divergence, [B, K]. For the reverse KL divergence this is the log-ratio."""
        return link(self.logratios, options.f_divergence, options.f_alpha)

    def margins(self, options: LossOptions) -> Tensor:
        """The chosen response's score minus the rejected one's, [B]. Times β this is the reward margin r̂_w − r̂_l."""
        scores = self.scores(options)
        return scores[:, 0] - scores[:, 1]


Objective = Callable[[Batch, LossOptions], Tensor]
"""A loss function: (rows, options with all defaults filled in) → the loss of each row, [B]."""


def smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """−(1 − ε) log σ(z) − ε log σ(−z): binary cross-entropy if a share ε of the labels is wrong. [B] → [B]."""
    losses = -(1 - label_smoothing) * torch.nn.functional.logsigmoid(logits)
    return losses - label_smoothing * torch.nn.functional.logsigmoid(-logits)
