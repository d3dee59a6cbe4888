"""Copies of what trains: on the disk for early stopping, in memory for a loss that breaks."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from worker.trainer.model import Policy


def write(policy: Policy, path: Path) -> None:
    """Write what trains to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().contiguous() for name, p in policy.trainable().items()}, path)


def bring_back(policy: Policy, path: Path) -> None:
    """Give `policy` the weights in `path`."""
    _copy(load_file(path), policy)


class LastGood:
    """The weights before the last update. Only an adapter is remembered: of a whole model a copy costs too much."""

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] | None = None

    def remember(self, policy: Policy) -> None:
        """Keep a copy of what trains, in the place of the one before."""
        if policy.full:
            return
        trained = policy.trainable()
        if self._weights is None:
            self._weights = {name: p.detach().clone() for name, p in trained.items()}
        for name, parameter in trained.items():
            self._weights[name].copy_(parameter.detach())

    def bring_back(self, policy: Policy) -> bool:
        """Give `policy` the weights that are remembered; False where there are none."""
        if self._weights is None:
            return False
        _copy(self._weights, policy)
        return True


def _copy(weights: dict[str, Tensor], policy: Policy) -> None:
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            parameter.copy_(weights[name])
