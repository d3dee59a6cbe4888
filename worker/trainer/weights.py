"""Copies of the trained weights: on disk for early stopping, in memory for a loss that becomes non-finite."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from worker.trainer.fully_sharded import empty_like, like, whole
from worker.trainer.model import Policy
from worker.trainer.ranks import Ranks


def save(policy: Policy, path: Path, ranks: Ranks) -> None:
    """Write the trained weights to `path` on the first of `ranks`. All call it."""
    kept = dict[str, Tensor]()
    for name, parameter in policy.trainable().items():
        values = whole(parameter.detach())
        if ranks.is_first:
            kept[name] = values.contiguous() if policy.root is None else values.cpu()
    if ranks.is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(kept, path)


def restore(policy: Policy, path: Path, ranks: Ranks) -> None:
    """Give `policy` the weights in `path`, which the first rank has."""
    weights = load_file(path) if ranks.is_first else {}
    for name, parameter in policy.trainable().items():
        values = weights[name].to(policy.device) if ranks.is_first else empty_like(parameter)
        ranks.copy_from(0, values)
        with torch.no_grad():
            parameter.copy_(like(values, parameter))


@contextmanager
def swapped(policy: Policy, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context the trained weights of `policy` have the values `weights`, such as those of its reference."""
    trained = policy.trainable()
    own = {name: parameter.data for name, parameter in trained.items()}
    try:
        for name, parameter in trained.items():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in trained.items():
            parameter.data = own[name]


def copied(policy: Policy) -> dict[str, Tensor]:
    """A copy of the trained weights of `policy`, by name."""
    return {name: parameter.detach().clone() for name, parameter in policy.trainable().items()}


class LastGood:
    """The weights before the last update, for adapters only: a copy of a whole model takes too much memory."""

    def __init__(self) -> None:
        self._trained, self._copies = list[Tensor](), list[Tensor]()

    def remember(self, policy: Policy) -> None:
        """Copy the trained weights over the previous copy."""
        if policy.full:
            return
        if not self._copies:  # once: to find them, the policy looks at all parameters
            self._trained = [parameter.detach() for parameter in policy.trainable().values()]
            self._copies = [torch.empty_like(weight) for weight in self._trained]
        torch._foreach_copy_(self._copies, self._trained)

    def restore(self) -> bool:
        """Give the policy the remembered weights. Returns False if there are none."""
        if not self._copies:
            return False
        torch._foreach_copy_(self._trained, self._copies)
        return True
