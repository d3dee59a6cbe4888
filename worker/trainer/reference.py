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
from worker.trainer.model import Policy, per_response
from worker.trainer.packing import columns

ENGINE = 2
"""Raised with every change to the engine that moves bits: what older ones computed is not used then."""


@dataclass(frozen=True)
class Reference:
    """Log-probs of every response of some rows: `logps` [responses], and where each row's begin, `first` [rows].

    `seen` [responses] is what the loss sees in their place: with LD-DPO the tokens of a tail count less.
    """

    logps: Tensor
    first: Tensor
    seen: Tensor

    def of(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """The values that the loss sees of responses `column` [R] of rows `row` [R], and their log-probs."""
        place = self.first[row] + column
        return self.seen[place], self.logps[place]


@dataclass(frozen=True)
class References:
    """The reference log-probs of the rows to train on and to validate on."""

    train: Reference
    validation: Reference


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
    logps, seen = torch.zeros(int(counts.sum())), torch.zeros(int(counts.sum()))
    with torch.no_grad():
        for pack in policy.packs(rows, range(len(rows)), merge=tail_weight is None):
            scores = policy.score(pack, tail_weight=tail_weight)
            numbers, row = torch.tensor(pack.rows), pack.row_of.cpu()
            place = (first[numbers[row]] + columns(row),)
            seen = seen.to(scores.responses.dtype).index_put(place, scores.responses.cpu())
            logps = logps.to(seen.dtype).index_put(place, per_response(pack, scores.tokens.logps).cpu())
            tick()
    return Reference(logps, first, seen)


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
        policy.computed_in,
        policy.device.type,
        device,
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
    )
    return f"reference/{hashlib.sha256(repr(parts).encode()).hexdigest()}"
