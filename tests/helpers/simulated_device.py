"""A device that is not there: its tensors are on the CPU, and each wait of the CPU for the device is recorded.

A GPU works through a queue of kernels while the CPU goes on. Some calls make the CPU wait until the queue is empty, such
as reading a number, or a copy from memory that is not pinned. Here the queue is always empty, so only the calls count.
"""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.helpers.hardware import causal_attention
from worker.trainer import attention, hardware, loading, loop, model
from worker.trainer.gradients import SegmentGradients
from worker.trainer.model import Policy

KIND = "meta"
"""The kind of device that the tensors say they are on. Autograd computes its gradients in the calling thread."""
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.is_nonzero, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.item,
}  # fmt: skip
"""Operators that need numbers of the device, or whose result has a size that depends on them."""


ACROSS = {aten.copy_, torch.ops.dpo.segment_products}
"""Operators that take tensors of the device and of the CPU together."""


class OnDevice(Tensor):
    """A tensor on the device. `numbers` is the one on the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnDevice":
        wrapper: OnDevice = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=torch.device(KIND),
        )  # fmt: skip
        wrapper.numbers = values
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{operator} is called outside of the simulation")


class Simulation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, tensors may be on the device. `waits` has the place of each wait in the engine's code."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tree_leaves((args, kwargs))
        own = any(isinstance(part, OnDevice) for part in inputs)
        target = kwargs.get("device")
        there = own if target is None else torch.device(target).type == KIND
        packet = operator.overloadpacket
        elsewhere = [
            part for part in inputs if isinstance(part, Tensor) and not isinstance(part, OnDevice) and part.dim()
        ]
        if own and elsewhere and packet not in ACROSS:
            raise AssertionError(f"{operator} gets tensors of the device and of the CPU")
        copies = packet in (aten._to_copy, aten.copy_)
        if own and (packet in READS or (packet in (aten.index, aten.index_put, aten.index_put_) and _masks(args))):
            self._wait(operator)
        elif copies and there != own:
            if not (there and kwargs.get("non_blocking")):
                self._wait(operator)
        elif packet is aten.copy_ and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
            self._wait(operator)
        result = operator(
            *tree_map(_numbers, args),
            **{name: torch.device("cpu") if name == "device" and value is not None else tree_map(_numbers, value)
               for name, value in kwargs.items()},
        )  # fmt: skip
        if operator._schema.is_mutable and not operator._schema.name.startswith("aten::_foreach"):
            return kwargs["out"] if "out" in kwargs else args[0]
        return tree_map(lambda part: OnDevice(part) if isinstance(part, Tensor) else part, result) if there else result

    def _wait(self, operator: Any) -> None:
        frames = [frame for frame in traceback.extract_stack() if f"{Path('worker') / 'trainer'}" in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}" if frames else "elsewhere"
        self.waits.append(f"{operator} at {place}")


def _numbers(part: Any) -> Any:
    return part.numbers if isinstance(part, OnDevice) else part


def _masks(args: Sequence[Any]) -> bool:
    """Whether an index is a mask, so that the size of the result depends on its numbers."""
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])


@contextmanager
def simulated(policy: Policy, patch: pytest.MonkeyPatch, choices: hardware.Hardware) -> Iterator[Simulation]:
    """Within this context `policy` is on the device, which has these `choices`."""
    patch.setitem(hardware.BY_KIND, KIND, choices)
    patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for this kind of device
    patch.setattr(torch, "is_autocast_enabled", lambda _: False)
    for module in (model, loop):
        patch.setattr(module, "fingerprint", lambda _: b"")  # it reads bytes
    patch.setattr(attention, "_compiled_flex", lambda: causal_attention)
    with Simulation() as simulation:
        heads = [] if policy.reward_head is None else [policy.reward_head]
        for layer in (*policy.model.modules(), *heads):
            for name, parameter in layer._parameters.items():
                if parameter is not None:
                    layer._parameters[name] = nn.Parameter(OnDevice(parameter.data), parameter.requires_grad)
            for name, buffer in layer._buffers.items():
                if buffer is not None:
                    layer._buffers[name] = OnDevice(buffer)
        policy.device, policy.segment_gradients = torch.device(KIND), SegmentGradients()
        loading._keep_segments_apart(policy)
        yield simulation
