"""The gradient of a step: a sum over segments in canonical order (see `segments`), whatever packs and ranks compute it.

1. Autograd sums a gradient over all tokens of a pack. Layers with a plain LoRA adapter get their weights once for each
   segment, so autograd keeps the gradients of segments apart (`SegmentGradients`). Each is added to the sum of its
   virtual rank. The gradients of all other parameters are of a whole pack, which then holds one segment.
2. The sums of the virtual ranks are added in order (`Reduction`). With several ranks each of them owns some parameters:
   it gets the sums for these, adds them, and updates these parameters (ZeRO-1, Rajbhandari et al. 2020).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from worker.trainer.hardware import wide_product
from worker.trainer.packing import Extent
from worker.trainer.ranks import Ranks

Sum = dict[nn.Parameter, Tensor]
"""Gradients by parameter, in the parameter's dtype, which is float32 or wider."""


class Views(NamedTuple):
    """Views of a layer's trained weights, [S, *shape] each: the same weight for each of S segments of a pack.

    `ends` [S], on the CPU: where each segment ends among the layer's inputs; None if all of them are one. A layer
    computes with view 0, and gives view s the gradient of segment s. The views take no memory.
    """

    weights: tuple[Tensor, ...]
    ends: Tensor | None = None


class Layer(Protocol):
    """A layer that keeps the gradients of segments apart, if it has `views`. Else it computes with its weights."""

    views: Views | None


def views_of(layer: Layer, *weights: Tensor) -> Views:
    """The views of `layer`, or its `weights` themselves where nobody wants gradients of segments."""
    views = layer.views
    return Views(tuple(weight[None] for weight in weights)) if views is None or not torch.is_grad_enabled() else views


class SegmentGradients:
    """Adds the gradients of a pack's segments to a sum for each of them, as soon as autograd has them."""

    def __init__(self) -> None:
        self._layers: list[tuple[Layer, Sequence[nn.Parameter], Literal["slots", "responses"]]] = []

    def keep_apart(
        self, layer: Layer, weights: Sequence[nn.Parameter], inputs: Literal["slots", "responses"] = "slots"
    ) -> None:
        """Let `layer` keep the gradients of its `weights` apart. `inputs`: what the rows of its input are."""
        self._layers.append((layer, weights, inputs))

    @contextmanager
    def added_to(self, sums: Sequence[Sum], extents: Sequence[Extent]) -> Iterator[None]:
        """Within this context a backward pass adds the gradients of segment s to `sums[s]`.

        `extents` are the places of the segments in their pack.
        """
        ends: dict[str, Tensor | None] = {"slots": None, "responses": None}  # a segment alone has all inputs
        if len(extents) > 1:
            ends["slots"] = torch.tensor([extent.slots.stop for extent in extents])
            ends["responses"] = torch.tensor([extent.responses.stop for extent in extents])
        try:
            for layer, weights, inputs in self._layers:
                layer.views = Views(tuple(_view(weight, sums) for weight in weights), ends[inputs])
            yield
        finally:
            for layer, _, _ in self._layers:
                layer.views = None


def _view(weight: nn.Parameter, sums: Sequence[Sum]) -> Tensor:
    """A view of `weight` for each of `sums`, to which its gradients are added."""

    def add(view: Tensor) -> None:
        assert view.grad is not None
        for total, gradient in zip(sums, view.grad, strict=True):
            if weight in total:
                total[weight].add_(gradient)
            else:  # a copy, because the view's gradient is as large as all segments' together
                total[weight] = gradient.clone()
        view.grad = None

    view = weight.detach().expand(len(sums), *weight.shape).requires_grad_()
    view.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]
    return view


@torch.library.custom_op("dpo::segment_products", mutates_args=())
def segment_products(left: Tensor, right: Tensor, ends: Tensor | None, dtype: torch.dtype) -> Tensor:
    """leftᵀ · right of each segment, [S, p, q] in `dtype`, for `left` [n, p] and `right` [n, q].

    The rows of segment s end before `ends[s]`; None: all are one segment. An operator of its own, because compiled code
    must not depend on `ends`.
    """
    products, start = [], 0
    for end in [len(left)] if ends is None else ends.tolist():
        rows, others = left[start:end].t(), right[start:end]
        products.append(rows @ others if rows.dtype == dtype else wide_product(rows, others, dtype))
        start = end
    return torch.stack(products)


@segment_products.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor | None, dtype: torch.dtype) -> Tensor:
    count = 1 if ends is None else ends.shape[0]  # `len` would compile for this number of segments alone
    return left.new_empty((count, left.shape[1], right.shape[1]), dtype=dtype)


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
    norms: Tensor = field(default_factory=lambda: torch.zeros(0))
    """The norms of the gradients of this rank's parameters, on the CPU."""

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

    def own_norms(self) -> Tensor:
        """The norms of the gradients of this rank's parameters, on their device."""
        gradients = self._gradients()
        return torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(0)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.own if parameter.grad is not None]

    def scale(self, factor: float) -> None:
        """Multiply the gradients of this rank's parameters, and their norms."""
        if gradients := self._gradients():
            torch._foreach_mul_(gradients, factor)
        self.norms = self.norms * factor

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient down to a norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

        Returns the norm before. The norms of the parameters are combined in the same order on any number of ranks.
        """
        norms = torch.cat([part for part in self.ranks.gather(self.norms) if len(part)] or [self.norms])
        total: Tensor = torch.linalg.vector_norm(norms)
        self.scale(float(torch.clamp(max_norm / (total + 1e-6), max=1.0)))
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
