"""Reference log-probs: of the starting policy, or of another model, computed once and kept.

The rows are packed in their own order, whatever the job's batches are, so that the same rows on the same weights
give the same bits in every job; the cache's key holds all that the bits depend on.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from worker.trainer.cache import Cache
from worker.trainer.dataset import Rows
from worker.trainer.model import Policy
from worker.trainer.packing import columns

ENGINE = 1
"""Raised with every change to the engine that moves bits: what older ones computed is not used then."""


@dataclass(frozen=True)
class Reference:
    """Log-probs of every response of some rows: `logps` [responses], and where each row's begin, `first` [rows]."""

    logps: Tensor
    first: Tensor

    def of(self, row: Tensor, column: Tensor) -> Tensor:
        """The log-probs of responses `column` [R] of rows `row` [R]."""
        return self.logps[self.first[row] + column]


def find(
    policy: Policy, digest: str, rows: Rows, tail_weight: float | None, cache: Cache, tick: Callable[[], None]
) -> Reference:
    """The log-probs of `rows`, from the cache or computed. On the CPU, float32 or wider. `digest` is the policy's."""
    if not len(rows):
        return compute(policy, rows)
    key = _key(policy, digest, rows, tail_weight)
    found = cache.get(key, lambda path: Reference(**load_file(path)))
    if found is not None:
        return found
    made = compute(policy, rows, tail_weight, tick)
    with cache.put(key) as place:
        save_file(vars(made), place)
    return made


def compute(
    policy: Policy, rows: Rows, tail_weight: float | None = None, tick: Callable[[], None] = lambda: None
) -> Reference:
    """Log-probs of `rows` under `policy` as it is. `tick` is called after each pack; `tail_weight` is LD-DPO's."""
    counts = torch.tensor([len(row.responses) for row in rows], dtype=torch.long)
    first = counts.cumsum(0) - counts
    logps = torch.zeros(int(counts.sum()))
    with torch.no_grad():
        for pack in policy.packs(rows, range(len(rows)), merge=tail_weight is None):
            values = policy.score(pack, tail_weight=tail_weight).responses.cpu()
            logps = logps.to(values.dtype)
            numbers, row = torch.tensor(pack.rows), pack.row_of.cpu()
            logps[first[numbers[row]] + columns(row)] = values
            tick()
    return Reference(logps, first)


def _key(policy: Policy, digest: str, rows: Rows, tail_weight: float | None) -> str:
    device = torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else torch.__version__
    parts = (
        ENGINE,
        digest,
        rows.digest(),
        tail_weight,
        policy.packing,
        policy.one_by_one,
        policy.own_head,
        policy.compiled,
        policy.device.type,
        device,
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
    )
    return f"reference/{hashlib.sha256(repr(parts).encode()).hexdigest()}"
