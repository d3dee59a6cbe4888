"""A frozen base in shards: each rank keeps a part of the bytes, and gathers one layer ahead of its use.

A unit is a layer, the embeddings or the head. The ranks gather the raw bytes of its matrices, packed or not, so a
sharded base computes exactly what a whole one does. Vectors, such as the weights of norms, stay whole on each rank.

Units share three buffers (slots): layers with even numbers, layers with odd numbers, and embeddings and head. The
weights are views of their slot. A backward pass gathers a layer into the same place, where autograd finds its weights.

To gather is the work of all ranks together. When they compute the same, they gather the same, unit by unit. In a launch
each rank computes something else, or nothing. Then all gather in the order of a pass, which `Order` records. A rank
without work, or one that ran out of memory, gathers for the others.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from bitsandbytes.nn import Int8Params
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from worker.trainer.layers import layer_names, on_load
from worker.trainer.ranks import Ranks

ALIGNMENT = 128
"""Bytes. Each matrix begins at a multiple of it, as torch's own allocations do."""
UNIT = "_sharded_unit"
"""The attribute of a module that names the unit of its weights."""


@dataclass
class Matrix:
    """A matrix of a unit. `place(values)` lets the model use `values` for it."""

    values: Tensor
    place: Callable[[Tensor], None]


@dataclass(eq=False)
class Unit:
    """Matrices that are gathered together, and this rank's `part` of their bytes, flat."""

    part: Tensor
    layout: list[tuple[int, Tensor, Matrix]]
    """The offset of each matrix, and a tensor without memory that has its shape and dtype."""
    slot: "Slot"

    @classmethod
    def of(cls, matrices: Sequence[Matrix], slot: "Slot", ranks: Ranks) -> "Unit":
        """Take the `matrices` from the model. Until `show`, the model has tensors without values in their place."""
        layout, end = list[tuple[int, Tensor, Matrix]](), 0
        for matrix in matrices:
            layout.append((end, matrix.values[:0].new_empty(1).expand(matrix.values.shape), matrix))
            end += -(-matrix.values.nbytes // ALIGNMENT) * ALIGNMENT  # rounded up
        size = -(-end // (ALIGNMENT * ranks.size)) * ALIGNMENT  # of a part
        flat = torch.zeros(size * ranks.size, dtype=torch.uint8, device=matrices[0].values.device)
        for offset, shape, matrix in layout:
            bytes_of = matrix.values.detach().contiguous().flatten().view(torch.uint8)
            flat[offset : offset + len(bytes_of)] = bytes_of
            matrix.place(shape)
            matrix.values = shape
        slot.size = max(slot.size, len(flat))
        return cls(flat[ranks.rank * size : (ranks.rank + 1) * size].clone(), layout, slot)

    def __deepcopy__(self, memo: object) -> "Unit":
        """A copy of a module, as PEFT makes for DoRA, gathers the same unit."""
        return self

    def gather(self) -> None:
        """Have the matrices here. To be called by all ranks."""
        self.slot.fetch(self)
        self.slot.wait()

    def show(self) -> None:
        """Let the model's weights be views of the slot."""
        for offset, shape, matrix in self.layout:
            flat = self.slot.buffer[offset : offset + shape.numel() * shape.element_size()]
            matrix.place(flat.view(shape.dtype).view(shape.shape))


@dataclass(eq=False)
class Slot:
    """A buffer for one unit at a time."""

    ranks: Ranks
    size: int = 0
    """Bytes of its largest unit."""
    unit: Unit | None = None
    """The unit that it holds, or that is on the way."""
    buffer: Tensor = field(init=False)
    _arrive: Callable[[], None] = lambda: None

    def fetch(self, unit: Unit) -> None:
        """Begin to gather `unit`."""
        if self.unit is not unit:
            self.wait()
            self.unit = unit
            self._arrive = self.ranks.collect(self.buffer[: len(unit.part) * self.ranks.size], unit.part)

    def wait(self) -> None:
        """Wait until the unit is here."""
        self._arrive()
        self._arrive = lambda: None


@dataclass(frozen=True)
class Order:
    """The units of a forward pass and of a backward pass after it, in the order of their use."""

    forward: Sequence[Unit] = ()
    backward: Sequence[Unit] = ()

    def of(self, forward_passes: int, *, backward: bool) -> list[Unit]:
        """The units of some forward passes, and of a backward pass at the end. None follows itself."""
        units = [*self.forward] * forward_passes + [*self.backward] * backward
        return [unit for unit, _ in groupby(units)]


class Shards:
    """The shards of a model's frozen base. Without any, each rank has the whole base, and all methods do nothing."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.units: list[Unit] = []
        self.order = Order()
        self._head: Unit | None = None
        self._slots = [Slot(self.ranks) for _ in range(3)]  # even layers, odd layers, embeddings and head
        self._unit_of: dict[int, Unit] = {}
        """The unit of each matrix, by the id of the object that the model knows it as."""
        self._used: list[Unit] | None = None
        """The units that the current recording has seen."""
        self._pass: list[Unit] | None = None
        """The order of the current pass."""
        self._position = -1

    def __bool__(self) -> bool:
        return bool(self.units)

    # -- taking a model apart ------------------------------------------------------------------------------------

    def on_load(self) -> AbstractContextManager[None]:
        """Within this context, transformers' loader gives each layer of a model away as soon as it is read."""
        return on_load(lambda layer, number: self._take(layer, number % 2))

    def finish(self, model: PreTrainedModel, *, ends: bool) -> None:
        """Take what the loader has left of `model`, and let its modules gather their weights when they are called.

        `ends`: whether to take the embeddings and the head. If they are trained they must stay whole.
        """
        layers = [model.get_submodule(name) for name in layer_names(model)]
        for number, layer in enumerate(layers):
            if not hasattr(layer, UNIT):
                self._take(layer, number % 2)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        for module in (embeddings, head) if ends else ():
            self._take(module, 2)
        self._head = unit_of(head)
        for slot in self._slots:
            slot.buffer = torch.empty(slot.size, dtype=torch.uint8, device=model.device)
        for unit in self.units:
            unit.show()
        for layer in layers:
            layer.register_forward_hook(self._before_backward)
        for module in model.modules():
            if hasattr(module, UNIT):
                module.register_forward_pre_hook(lambda module, _: self.gather(module))

    def _take(self, module: nn.Module, slot: int) -> None:
        """Take the matrices of `module` as a unit. Matrices that another unit has, such as tied ones, stay there."""
        owners = [owner for owner in module.modules() if owner is module or any(_matrices(owner))]
        matrices = {key: matrix for owner in owners for key, matrix in _matrices(owner)}
        units = {self._unit_of[key] for key in matrices if key in self._unit_of}
        if not units and matrices:
            units = {Unit.of(list(matrices.values()), self._slots[slot], self.ranks)}
            self.units += units
            self._unit_of |= dict.fromkeys(matrices, *units)
        elif len(units) > 1 or not all(key in self._unit_of for key in matrices):
            raise ValueError("its layers share a part of their weights. Set 'parallel.shard' to false")
        for owner in owners:
            for unit in units:
                setattr(owner, UNIT, unit)

    # -- use -----------------------------------------------------------------------------------------------------

    def gather(self, module: nn.Module) -> None:
        """Have the weights of `module` here."""
        if (unit := unit_of(module)) is not None:
            self._need(unit)

    def gather_head(self) -> None:
        """Have the weights of the head here."""
        if self._head is not None:
            self._need(self._head)

    def gather_parameter(self, parameter: nn.Parameter) -> None:
        """Have `parameter` here."""
        if (unit := self._unit_of.get(id(parameter))) is not None:
            self._need(unit)

    def _before_backward(self, layer: nn.Module, _: object, output: object) -> None:
        """Let the backward pass of `layer` begin with its weights."""
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: self.gather(layer))  # type: ignore[no-untyped-call]

    def _need(self, unit: Unit) -> None:
        if self._used is not None and self._used[-1:] != [unit]:
            self._used.append(unit)
        if self._pass is not None and (self._position < 0 or self._pass[self._position] is not unit):
            self._position += 1
            if self._pass[self._position : self._position + 1] != [unit]:
                raise RuntimeError("a pass uses the weights of its layers in another order than the first pass did")
        unit.gather()
        following = [] if self._pass is None else self._pass[self._position + 1 : self._position + 2]
        for ahead in following:
            if ahead.slot is not unit.slot:
                ahead.slot.fetch(ahead)

    # -- passes --------------------------------------------------------------------------------------------------

    def record(self, compute: Callable[[], Tensor]) -> None:
        """Learn the order from the pass `compute`, which returns a result [...] whose sum has a gradient, or none."""
        if not self:
            return
        self._used = used = list[Unit]()
        result = compute()
        forward = len(used)
        if result.requires_grad:
            result.sum().backward()  # type: ignore[no-untyped-call]
        self.order, self._used = Order(used[:forward], used[forward:]), None

    @contextmanager
    def together(self, forward_passes: int = 1, *, backward: bool) -> Iterator[None]:
        """Within this context the ranks compute passes, each with other data or none. At the end all have gathered all.

        `backward`: whether a backward pass follows the forward passes.
        """
        if not self:
            yield
            return
        self._pass, self._position = self.order.of(forward_passes, backward=backward), -1
        try:
            yield
        finally:
            for unit in self._pass[self._position + 1 :]:
                self._need(unit)
            self._pass = None


def unit_of(module: nn.Module) -> Unit | None:
    """The unit that holds the weights of `module`; None if they are whole."""
    unit: Unit | None = getattr(module, UNIT, None)
    return unit


def _matrices(module: nn.Module) -> Iterator[tuple[int, Matrix]]:
    """The matrices that `module` itself holds, by id: its parameters and the scales of packed ones."""
    for parameter in module._parameters.values():
        if parameter is None or parameter.dim() < 2 or parameter.device.type == "meta":
            continue
        yield id(parameter), Matrix(parameter.data, partial(_place, parameter))
        state = getattr(parameter, "quant_state", None)  # of a 4-bit weight
        if state is not None:
            yield id(state), Matrix(state.absmax, partial(setattr, state, "absmax"))


def _place(parameter: nn.Parameter, values: Tensor) -> None:
    parameter.data = values
    if isinstance(parameter, Int8Params):
        parameter.CB = values
