"""Full-parameter training of a model that is divided among ranks, by torch's FSDP2 (`fully_shard`).

Each rank keeps a part of every parameter, of its gradient and of its optimizer state. A layer is gathered before its
use and dropped after it. The gradients of all ranks are summed in the order of torch's collective. So the same number
of ranks gives the same bytes, and another number gives other last bits.

All ranks must compute the same number of passes. A rank without rows computes one that counts nothing.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from worker.trainer.gradients import Ownership
from worker.trainer.hardware import hardware
from worker.trainer.layers import layer_names, on_load
from worker.trainer.progress import progress
from worker.trainer.ranks import Ranks

Result = TypeVar("Result")


class Root(nn.Module):
    """The whole policy for FSDP. A function that it runs may use the weights of the policy.

    The weights of a layer are there while the layer runs.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, compute: Callable[[], Result]) -> Result:
        return compute()


@dataclass(frozen=True)
class FullShards:
    """Divides a model among `ranks`, on devices of the kind `device`."""

    ranks: Ranks
    device: torch.device

    @cached_property
    def _mesh(self) -> DeviceMesh:
        return init_device_mesh(self.device.type, (self.ranks.size,))

    def on_load(self) -> AbstractContextManager[None]:
        """Within this context, transformers' loader divides each layer of a model as soon as it is read."""
        return on_load(lambda layer, _: self._divide(layer))

    def _divide(self, module: nn.Module) -> None:
        before = dict(module.named_parameters())
        loaded = {name for name, parameter in before.items() if getattr(parameter, "_is_hf_initialized", False)}
        # The layers of a GPU compute in 16 bits. The weights that are updated, and all sums, are float32.
        halved = hardware(self.device).half and not isinstance(module, Root)
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if halved else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        fully_shard(module, mesh=self._mesh, reshard_after_forward=True, mp_policy=precision)
        for name, parameter in module.named_parameters():  # new objects, which the loader must not initialise again
            parameter._is_hf_initialized = name in loaded  # type: ignore[attr-defined]

    def finish(self, model: PreTrainedModel, *others: nn.Module) -> Root:
        """Divide what the loader has left of `model`, and the `others`."""
        root = Root(model, *others)
        for name in layer_names(model):
            layer = model.get_submodule(name)
            if not isinstance(layer, FSDPModule):
                self._divide(layer)
        self._divide(root)
        for module in root.modules():
            if isinstance(module, FSDPModule):  # the sum of the ranks' gradients, not their mean
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return root


class Divided(Ownership):
    """Each rank updates its part of every parameter."""

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
        super().__init__(parameters, ranks)
        self.owners = [list(parameters)] * ranks.size

    def own_norms(self) -> Tensor:
        return torch.zeros(0)  # no rank has a whole gradient

    def clip(self, max_norm: float) -> Tensor:
        norm: Tensor = whole(torch.nn.utils.clip_grad_norm_(self.parameters, max_norm))
        return norm

    def share(self) -> None:
        """Nothing: each rank keeps its part."""


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be divided among ranks, whole. All ranks must call it then."""
    if not isinstance(tensor, DTensor):
        return tensor
    with progress.waits():
        return tensor.full_tensor()


def like(values: Tensor, tensor: Tensor) -> Tensor:
    """The whole `values`, divided like `tensor` if that is."""
    values = values.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return values
    return distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)


def empty_like(tensor: Tensor) -> Tensor:
    """A whole tensor of the shape and dtype of one that may be divided, on its device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
