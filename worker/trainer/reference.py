"""Reference log-probs, of the starting policy or of another model, computed once and cached.

The rows are packed in their own order, independently of the job's batches. The same rows and weights therefore give
the same bits in every job. The key of the cache covers everything that the bits depend on.

A pass puts its results into the cache in stretches, each a number of segments. The key of a stretch says with which
segment it begins, so a pass that was stopped goes on where it ended. With several ranks, each computes a part of the
segments, all get the results, and the first one keeps the cache.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from worker.trainer.cache import Cache
from worker.trainer.dataset import Rows
from worker.trainer.errors import Stopped
from worker.trainer.launcher import Launcher, Values
from worker.trainer.model import Policy, per_response
from worker.trainer.packing import Pack, columns

ENGINE_VERSION = 3
"""Raise it with every change of the engine that changes bits: cached values of older versions are then not used."""
STRETCH_SECONDS = 60.0
"""The longest stretch. A pass whose process is killed loses no more than this."""


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


@dataclass(frozen=True)
class Stretch:
    """The results of consecutive segments.

    `index` [n] says which responses of the pass they are; `logps` and `seen` [n] are as in `Reference`. `size` [2] is
    the number of segments and the number of their rows.
    """

    index: Tensor
    logps: Tensor
    seen: Tensor
    size: Tensor

    @classmethod
    def joined(cls, parts: Sequence["Stretch"]) -> "Stretch":
        """The results of all `parts`, of which there is at least one."""
        index, logps, seen = (torch.cat([getattr(part, name) for part in parts]) for name in ("index", "logps", "seen"))
        return cls(index, logps, seen, torch.stack([part.size for part in parts]).sum(0))


def find_or_compute(
    launcher: Launcher, digest: str, rows: Rows, tail_weight: float | None, cache: Cache, report: Callable[[int], None]
) -> Reference:
    """The log-probs of `rows` under the launcher's policy, from the cache or computed: on the CPU, float32 or wider.

    `digest` identifies the policy's weights. The other arguments are those of `compute`. If `report` raises `Stopped`,
    the cache has all results so far.
    """
    ranks, first = launcher.ranks, _first_responses(rows)
    key = _key(launcher.policy, digest, rows, tail_weight)
    # 1. Collect what the cache has.
    stretches = ranks.of_first(lambda: _cached(key, len(rows), cache))
    segments, done = (sum(int(stretch.size[k]) for stretch in stretches) for k in (0, 1))  # those done, and their rows
    # 2. Compute the rest, and put it into the cache.
    fresh, began = list[Stretch](), time.monotonic()

    def keep() -> None:
        nonlocal segments, began
        if fresh:
            stretches.append(Stretch.joined(fresh))
            fresh.clear()
            if ranks.is_first:
                with cache.put(_stretch_key(key, segments)) as path:
                    save_file(vars(stretches[-1]), path)
            segments, began = segments + int(stretches[-1].size[0]), time.monotonic()

    try:
        report(done)
        for scored in _score(launcher, rows, first, tail_weight, skip=segments):
            fresh.append(scored)
            done += int(scored.size[1])
            report(done)
            if time.monotonic() - began > STRETCH_SECONDS:
                keep()
    except Stopped:
        keep()
        raise
    keep()
    return _arranged(first, stretches)


def mapped(found: Reference, path: Path) -> Reference:
    """The reference log-probs `found`, in the file `path`, which the ranks of a machine map into memory."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(vars(found), path)
    return Reference(**load_file(path))


def _cached(key: str, rows: int, cache: Cache) -> list[Stretch]:
    """The stretches of the pass `key` that the cache has, from the first one on."""
    stretches, segments, done = list[Stretch](), 0, 0
    while done < rows:
        stretch = cache.get(_stretch_key(key, segments), lambda path: Stretch(**load_file(path)))
        if stretch is None:
            break
        stretches.append(stretch)
        segments, done = segments + int(stretch.size[0]), done + int(stretch.size[1])
    return stretches


def compute(
    launcher: Launcher,
    rows: Rows,
    tail_weight: float | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> Reference:
    """The log-probs of `rows` under the launcher's policy with its current weights.

    `tail_weight` is the weight of tail tokens in LD-DPO. `report` is called after each launch with the rows done so
    far.
    """
    first, parts, done = _first_responses(rows), list[Stretch](), 0
    for scored in _score(launcher, rows, first, tail_weight):
        parts.append(scored)
        done += int(scored.size[1])
        report(done)
    return _arranged(first, parts)


def _score(
    launcher: Launcher, rows: Rows, first: Tensor, tail_weight: float | None, skip: int = 0
) -> Iterator[Stretch]:
    """The results of `rows`, a few segments at a time, without the first `skip` ones.

    `first` is that of `_first_responses`.
    """
    policy = launcher.policy
    segments = islice(policy.segments(rows, range(len(rows)), merge=tail_weight is None), skip, None)

    def score(pack: Pack) -> Values:
        scores = policy.score(pack, tail_weight=tail_weight)
        return {"logps": per_response(pack, scores.tokens.logps), "seen": scores.responses}

    for scored, values in launcher.forward(segments, score):
        numbers = torch.tensor([number for segment in scored for number in segment.rows])
        row = torch.repeat_interleave(first[numbers + 1] - first[numbers])  # the index of each response's row, [R]
        index = first[numbers[row]] + columns(row)  # the place of each response in the result, [R]
        yield Stretch(index, values["logps"], values["seen"], torch.tensor([len(scored), len(numbers)]))


def _first_responses(rows: Rows) -> Tensor:
    """The index of each row's first response among those of all rows, and the number of them all. [rows + 1]"""
    counts = torch.tensor([len(row.responses) for row in rows], dtype=torch.long)
    return torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])


def _arranged(first: Tensor, parts: Sequence[Stretch]) -> Reference:
    """The results in the order of the rows. `first` is that of `_first_responses`."""
    logps, seen = torch.zeros(int(first[-1])), torch.zeros(int(first[-1]))  # [responses]
    if parts:
        scored = Stretch.joined(parts)
        logps = torch.empty_like(scored.logps).index_put((scored.index,), scored.logps)
        seen = torch.empty_like(scored.seen).index_put((scored.index,), scored.seen)
    return Reference(logps, first[:-1], seen)


def _key(policy: Policy, digest: str, rows: Rows, tail_weight: float | None) -> str:
    """A hash of everything that the bits of the log-probs depend on."""
    device = torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else torch.__version__
    parts = (
        ENGINE_VERSION,
        digest,
        rows.digest(),
        tail_weight,
        # The budget changes no bit, unless all parameters are trained (see `Policy.joins`).
        replace(policy.packing, budget=policy.launch_tokens if policy.full else 0),
        policy.one_by_one,
        policy.own_logits,
        policy.compiled,
        policy.root is not None,  # FSDP rounds the weights of layers on a GPU
        policy.autocast_dtype,
        policy.device.type,
        device,
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _stretch_key(key: str, segments: int) -> str:
    """The key in the cache of the stretch after the first `segments` segments of the pass `key`."""
    return f"reference/{key}/{hashlib.sha256(str(segments).encode()).hexdigest()}"
