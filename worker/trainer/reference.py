"""Reference log-probs, of the starting policy or of another model, computed once and cached.

The rows are packed in their own order, independently of the job's batches. The same rows and weights therefore give
the same bits in every job. The key of the cache covers everything that the bits depend on.
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

ENGINE_VERSION = 2
"""Raise it with every change of the engine that changes bits: cached values of older versions are then not used."""


@dataclass(frozen=True)
class Reference:
    """Reference log-probs of all responses of some rows, row after row.

    `logps` [responses]; `first` [rows], the index of each row's first response; `seen` [responses], the values that
    the loss uses. `seen` differs from `logps` with LD-DPO, which gives less weight to the tokens of a tail.
    """

    logps: Tensor
    first: Tensor
    seen: Tensor

    def look_up(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """(the values that the loss uses, log-probs) [R] of the responses `column` [R] of the rows `row` [R]."""
        index = self.first[row] + column
        return self.seen[index], self.logps[index]


@dataclass(frozen=True)
class References:
    """The reference log-probs of the training rows and of the validation rows."""

    train: Reference
    validation: Reference


def find_or_compute(
    policy: Policy, digest: str, rows: Rows, tail_weight: float | None, cache: Cache, report: Callable[[int], None]
) -> Reference:
    """The log-probs of `rows` under `policy`, from the cache or computed: on the CPU, float32 or wider.

    `digest` identifies the policy's weights. The other arguments are those of `compute`.
    """
    if not len(rows):
        return compute(policy, rows)
    key = _key(policy, digest, rows, tail_weight)
    cached = cache.get(key, lambda path: Reference(**load_file(path)))
    if cached is not None:
        return cached
    computed = compute(policy, rows, tail_weight, report)
    with cache.put(key) as path:
        save_file(vars(computed), path)
    return computed


def compute(
    policy: Policy, rows: Rows, tail_weight: float | None = None, report: Callable[[int], None] = lambda done: None
) -> Reference:
    """The log-probs of `rows` under `policy` with its current weights.

    `tail_weight` is the weight of tail tokens in LD-DPO. `report` is called after each pack with the rows done so far.
    """
    counts = torch.tensor([len(row.responses) for row in rows], dtype=torch.long)
    first = counts.cumsum(0) - counts  # [rows]
    logps, seen = torch.zeros(int(counts.sum())), torch.zeros(int(counts.sum()))  # [responses]
    done = 0  # rows
    with torch.no_grad():
        for pack in policy.packs(rows, range(len(rows)), merge=tail_weight is None):
            scores = policy.score(pack, tail_weight=tail_weight)
            numbers, row = torch.tensor(pack.rows), pack.row_of.cpu()
            index = (first[numbers[row]] + columns(row),)  # the place of each response in the result, [R]
            seen = seen.to(scores.responses.dtype).index_put(index, scores.responses.cpu())
            logps = logps.to(seen.dtype).index_put(index, per_response(pack, scores.tokens.logps).cpu())
            done += len(pack.rows)
            report(done)
    return Reference(logps, first, seen)


def _key(policy: Policy, digest: str, rows: Rows, tail_weight: float | None) -> str:
    """The key in the cache: everything that the bits of the log-probs depend on."""
    device = torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else torch.__version__
    parts = (
        ENGINE_VERSION,
        digest,
        rows.digest(),
        tail_weight,
        policy.packing,
        policy.one_by_one,
        policy.own_logits,
        policy.compiled,
        policy.autocast_dtype,
        policy.device.type,
        device,
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
    )
    return f"reference/{hashlib.sha256(repr(parts).encode()).hexdigest()}"
