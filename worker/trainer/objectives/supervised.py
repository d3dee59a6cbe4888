"""Supervised fine-tuning: maximum likelihood of the answers."""

from torch import Tensor


def negative_log_likelihood(token_logps: Tensor) -> Tensor:
    """−log π(y_t | x, y_<t) for each scored token: [N] → [N]. The loss is its mean over the batch's tokens."""
    return -token_logps
