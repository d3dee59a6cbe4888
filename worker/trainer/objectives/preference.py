"""DPO (Rafailov et al. 2023, arXiv:2305.18290)."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def implicit_rewards(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """r̂(x, y) = β log(π(y|x) / π_ref(y|x)), up to β log Z(x), which cancels in every comparison (Eq. 5)."""
    return beta * (policy - reference)


def sigmoid_loss(rewards: Tensor) -> Tensor:
    """−log σ(r̂_w − r̂_l) for each pair (Eq. 7). `rewards` [B, 2]: chosen, rejected. Returns [B].

    Its gradient is −β σ(r̂_l − r̂_w) [∇log π(y_w) − ∇log π(y_l)].
    """
    return -logsigmoid(rewards[:, 0] - rewards[:, 1])
