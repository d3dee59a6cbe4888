"""Losses of supervised fine-tuning, per token. The loss of a step is the mean over all of its scored tokens."""

from torch import Tensor


def negative_log_likelihood(token_logps: Tensor) -> Tensor:
    """Maximum likelihood: −log π(y_t | x, y_<t) of each scored token, [N] → [N]."""
    return -token_logps


def dynamic(token_logps: Tensor) -> Tensor:
    """Dynamic Fine-Tuning (Wu et al. 2025, arXiv:2508.05629, Eq. 9): −sg[π(y_t)] log π(y_t), [N] → [N].

    sg stops the gradient: each token is weighted by its probability.
    """
    return -token_logps.detach().exp() * token_logps


TOKEN_LOSSES = {"nll": negative_log_likelihood, "dft": dynamic}
"""The function of each supervised loss, by its name in the job spec."""
