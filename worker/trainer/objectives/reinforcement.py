"""Objectives of reinforcement: advantages from rewards, and losses from ratios of probabilities.

P prompts have K answers each. The objective is Rafailov et al. 2023, Eq. 3: E[r(x, y)] − β KL(π‖π_ref).
"""

import torch
from torch import Tensor

STD_FLOOR = 1e-4
"""Added to a standard deviation before it divides, as TRL does."""
LARGEST = 20.0
"""The largest logarithm of a ratio, in nats. Beyond it, exp would overflow sooner or later."""


def leave_one_out(rewards: Tensor) -> Tensor:
    """r_i minus the mean reward of the other answers, [P, K] (RLOO, Ahmadian et al. 2024, arXiv:2402.14740, Eq. 8)."""
    count = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * (count / (count - 1))


def standardised(rewards: Tensor) -> Tensor:
    """(r_i − mean) / std over the answers to a prompt, [P, K] (GRPO, Shao et al. 2024, arXiv:2402.03300, Sec. 4.1)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + STD_FLOOR)


def _ratios(logratios: Tensor) -> Tensor:
    return logratios.clamp(max=LARGEST).exp()


def clipped(logratios: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """−min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) with ρ = exp(`logratios`) (Schulman et al. 2017, arXiv:1707.06347, Eq. 7)."""
    ratios = _ratios(logratios)
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)


def is_clipped(logratios: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """Whether clipping keeps the gradient from an answer or a token: its ratio is already on the far side."""
    ratios = _ratios(logratios)
    return ((ratios > 1 + clip) & (advantages > 0)) | ((ratios < 1 - clip) & (advantages < 0))


def generalised_advantages(rewards: Tensor, values: Tensor, decay: float) -> Tensor:
    """A_t = Σ_k λ^k δ_{t+k} with δ_t = r_t + V_{t+1} − V_t, [T], for the tokens of one answer, after which V is 0.

    GAE with γ = 1 and λ = `decay` (Schulman et al. 2016, arXiv:1506.02438, Eq. 16).
    """
    following = torch.cat([values[1:], values.new_zeros(1)])
    deltas, total, advantages = (rewards + following - values).tolist(), 0.0, list[float]()
    for delta in reversed(deltas):
        total = delta + decay * total
        advantages.append(total)
    return rewards.new_tensor(advantages[::-1])


def value_loss(values: Tensor, before: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ max((V − R)², (V′ − R)²), with V′ = V within ± `clip` of the value `before` the update."""
    near = before + (values - before).clamp(-clip, clip)
    return torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2


def k3(logps: Tensor, reference: Tensor) -> Tensor:
    """The estimate ρ − log ρ − 1 of KL(π‖π_ref), with ρ = π_ref/π, never negative (Schulman 2020; GRPO, Eq. 4)."""
    difference = (reference - logps).clamp(max=LARGEST)
    return difference.exp() - difference - 1


def preference(logps: Tensor, reference: Tensor, beta: float) -> Tensor:
    """The DPO loss of a better and a worse answer, [P], from their log-probs [P, 2] (Rafailov et al. 2023, Eq. 7)."""
    margins = beta * ((logps[:, 0] - reference[:, 0]) - (logps[:, 1] - reference[:, 1]))
    return -torch.nn.functional.logsigmoid(margins)
