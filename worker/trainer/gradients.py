"""The gradient of a step: a sum over segments in canonical order (see `segments`), whatever packs and ranks compute it.

1. Layers with a plain LoRA adapter add one product for each segment to the sum of its virtual rank (`Products`). The
   gradients of all other parameters come from autograd, and their packs hold one segment.
2. The sums of the virtual ranks are added in order (`Reduction`). With several ranks each of them owns some parameters:
   it gets the sums for these, adds them, and updates these parameters (ZeRO-1, Rajbhandari et al. 2020).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from worker.trainer.hardware import wide_product
from worker.trainer.ranks import Ranks

Sum = dict[nn.Parameter, Tensor]
"""Gradients by parameter, in the parameter's dtype, which is float32 or wider."""


@dataclass(frozen=True)
class Target:
    """A segment of the pack in computation: its slots, the responses of its rows, and the sum that it belongs to."""

    slots: slice
    responses: slice
    sum: Sum


@dataclass
class Products:
    """Where the layers of a policy add the products of the current pack. Without targets, autograd sums."""

    targets: list[Target] | None = None


def add_product(total: Sum, parameter: nn.Parameter, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ · right to the gradient of `parameter` [p, q], for `left` [n, p] and `right` [n, q]."""
    if left.dtype != parameter.dtype:  # 16 bits on a GPU: accumulate and return the product in float32
        product = wide_product(left.t(), right, parameter.dtype)
    elif parameter in total:
        total[parameter].addmm_(left.t(), right)
        return
    else:
        product = left.t() @ right
    total[parameter] = total[parameter].add_(product) if parameter in total else product


def take_gradients(total: Sum, parameters: Iterable[nn.Parameter]) -> None:
    """Move the gradients that autograd has summed in `parameters` to `total`."""
    for parameter in parameters:
        if parameter.grad is not None:
            total[parameter], parameter.grad = parameter.grad, None


class Reduction:
    """The sums of a step's virtual ranks, added in order. To be used for one step."""

    def __init__(self, owned: "Ownership") -> None:
        self._owned, self._ranks = owned, owned.ranks
        self._totals: Sum = {}
        self._touched: set[int] = set()
        """The numbers of the parameters that have a gradient."""
        self._arriving: Callable[[], None] = lambda: None

    def add(self, number: int, count: int, own: Sum | None) -> None:
        """Add the round `number`: the sums of `count` virtual ranks, of which this rank has computed one.

        `own` is that one; None if it has computed none. The sums are then taken: nobody else may change them.
        """
        self._arriving()
        self._arriving = lambda: None
        if self._ranks.size == 1:
            self._add(own or {})
            return
        owned, ranks = self._owned, self._ranks
        numbers = {parameter: number for number, parameter in enumerate(owned.parameters)}
        self._touched |= {numbers[parameter] for parameter in own or {}}
        backwards = number % 2 == 1  # see `StepPlan.rounds`
        senders = [k for k in range(ranks.size) if (ranks.size - 1 - k if backwards else k) < count]
        parts = [owned.flat(own, rank) for rank in range(ranks.size)]
        wait = ranks.swap(parts, [owned.size(ranks.rank) if k in senders else 0 for k in range(ranks.size)])

        def arrive() -> None:
            received = wait()
            for k in reversed(senders) if backwards else senders:
                self._add(owned.unflat(received[k], ranks.rank))

        self._arriving = arrive

    def _add(self, other: Sum) -> None:
        for parameter, gradient in other.items():
            if parameter in self._totals:
                self._totals[parameter].add_(gradient)
            else:
                self._totals[parameter] = gradient

    def finish(self) -> None:
        """Set the gradients of the owned parameters to the sums of all rounds, and those of the others to None."""
        self._arriving()
        owned = self._owned
        touched = {owned.parameters[number] for numbers in self._ranks.gather(self._touched) for number in numbers}
        for parameter in owned.parameters:
            parameter.grad = None
        for parameter, gradient in self._totals.items():
            if self._ranks.size == 1 or parameter in touched:
                parameter.grad = gradient


@dataclass
class Ownership:
    """Which rank updates which of the trained parameters: consecutive ones, of about equal size together."""

    parameters: Sequence[nn.Parameter]
    ranks: Ranks
    owners: list[list[nn.Parameter]] = field(init=False)
    """The parameters of each rank."""

    def __post_init__(self) -> None:
        total, before = sum(parameter.numel() for parameter in self.parameters), 0
        self.owners = [[] for _ in range(self.ranks.size)]
        for parameter in self.parameters:
            middle = before + parameter.numel() / 2
            self.owners[min(int(self.ranks.size * middle / max(1, total)), self.ranks.size - 1)].append(parameter)
            before += parameter.numel()

    @property
    def own(self) -> list[nn.Parameter]:
        """The parameters that this rank updates."""
        return self.owners[self.ranks.rank]

    # -- flat buffers --------------------------------------------------------------------------------------------

    def size(self, rank: int) -> int:
        """Number of elements of the parameters of `rank`."""
        return sum(parameter.numel() for parameter in self.owners[rank])

    def flat(self, gradients: Sum | None, rank: int) -> Tensor:
        """The `gradients` of the parameters of `rank`, one after the other. Empty if there are none at all."""
        parts = [] if gradients is None else [
            gradients[parameter].flatten() if parameter in gradients else torch.zeros_like(parameter).flatten()
            for parameter in self.owners[rank]
        ]  # fmt: skip
        return torch.cat(parts) if parts else torch.empty_like(self.parameters[0]).flatten()[:0]

    def unflat(self, values: Tensor, rank: int) -> Sum:
        """The parts of the flat `values` by parameter of `rank`."""
        owners = self.owners[rank]
        parts = torch.split(values, [parameter.numel() for parameter in owners])
        return {parameter: part.view_as(parameter) for parameter, part in zip(owners, parts, strict=True)}

    # -- an update -----------------------------------------------------------------------------------------------

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient down to a norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

        Returns the norm before. The norms of the parameters are combined in the same order on any number of ranks.
        """
        gradients = [parameter.grad for parameter in self.own if parameter.grad is not None]
        own = torch.stack(torch._foreach_norm(gradients)).cpu() if gradients else torch.zeros(0)
        norms = torch.cat([part for part in self.ranks.gather(own) if len(part)] or [own])
        total: Tensor = torch.linalg.vector_norm(norms)
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        if gradients:
            torch._foreach_mul_(gradients, scale.item())
        return total

    def share(self) -> None:
        """Give all ranks the parameters that their owners have updated."""
        if self.ranks.size == 1:
            return
        with torch.no_grad():
            for rank, parameters in enumerate(self.owners):
                if parameters:
                    values = torch.cat([parameter.detach().flatten() for parameter in parameters])
                    self.ranks.copy_from(rank, values)
                    for parameter, part in self.unflat(values, rank).items():
                        parameter.copy_(part)
