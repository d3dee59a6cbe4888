"""The memory that a step needs, by measurement, and the memory that is free. All sizes are in bytes."""

import resource
from pathlib import Path

import torch
from torch import Tensor

from worker.machine import free_memory
from worker.model_files import weight_bytes
from worker.trainer.model import Policy
from worker.trainer.packing import Pack

USABLE_SHARE = 0.8
"""The share of the free memory that activations and optimizer state may fill."""
KEPT_SHARE = 0.25
"""The share of the free memory that dequantised weights may fill."""
OPTIMIZER_BYTES = 12
"""Bytes for each trained parameter in float32: its gradient and two moments."""


def fits_as_float32(folder: Path) -> bool:
    """Whether the weights in `folder` fit into the free memory as float32: at most twice their size on disk."""
    return 2 * weight_bytes(folder) < free_memory()


def activation_bytes(policy: Policy, pack: Pack) -> int:
    """Bytes that a forward pass over `pack` keeps for its backward pass, without the weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*policy.model.parameters(), *policy.groups.kept)}
    saved: dict[int, int] = {}  # address of a storage -> its bytes

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    recording = torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor)
    as_in_a_step = policy.segment_gradients.added_to([{} for _ in pack.extents], pack.extents)
    with policy.shards.together(backward=False), as_in_a_step, recording:
        # Keep the result until the sum is done: its graph holds the storages, and so no address is reused.
        result = policy.outcome(pack)
        total = sum(saved.values())
    del result
    return total


def activations_fit(policy: Policy, pack: Pack, longest: int) -> bool:
    """Whether a step's activations fit into memory without recomputing them, extrapolated from `pack`.

    `longest` is the number of tokens of the largest row, which no pack can split.
    """
    width = max(policy.launch_tokens, longest)
    needed = activation_bytes(policy, pack) * width / pack.slots  # bytes; they grow with the tokens
    trained = sum(parameter.numel() for parameter in policy.trainable().values())
    return needed + OPTIMIZER_BYTES * trained < USABLE_SHARE * free_bytes(policy.device)


def keep_weights(policy: Policy) -> float:
    """Keep the weights of a base in NF4 dequantised, where much memory is free. Returns their gigabytes: 0 if not.

    A divided base is divided because memory is short.
    """
    size = policy.groups.dequantised_bytes
    if policy.is_divided or not size or size > KEPT_SHARE * free_bytes(policy.device):
        return 0.0
    policy.groups.keep()
    return size / 1e9


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_memory()


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB
