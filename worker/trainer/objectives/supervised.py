"""Supervised fine-tuning: losses of tokens."""

from torch import Tensor


def negative_log_likelihood(token_logps: Tensor) -> Tensor:
    """−log π(y_t | x, y_<t) for each scored token: [N] → [N]. The loss is its mean over the batch's tokens."""
    return -token_logps


def dynamic(token_logps: Tensor) -> Tensor:
    """Dynamic Fine-Tuning (Wu et al. 2025, arXiv:2508.05629, Eq. 9): −sg[π(y_t)] log π(y_t), [N] → [N]."""
    return -token_logps.detach().exp() * token_logps


LOSSES = {"nll": negative_log_likelihood, "dft": dynamic}
"""By the name that the job spec gives."""
