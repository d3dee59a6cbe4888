"""Reference log-probs, of the starting policy or of another model, computed once and cached.

The rows are packed in their own order, independently of the job's batches. The same rows and weights therefore give
the same bits in every job. The key of the cache covers everything that the bits depend on.

A pass puts its results into the cache in stretches, each a number of segments. The key of a stretch says with which
segment it begins, so a pass that was stopped goes on where it ended. With several ranks, each computes a part of the
segments, and the first one keeps the cache. The first rank of each machine writes the results to files, which all ranks
there map into memory. So the memory of a pass does not grow with its rows.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from worker.trainer.cache import Cache
from worker.trainer.dataset import Rows
from worker.trainer.errors import Stopped
from worker.trainer.launcher import Launcher, Values
from worker.trainer.model import Policy, per_response
from worker.trainer.packing import Pack, columns
from worker.trainer.ranks import Ranks

ENGINE_VERSION = 5
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


class _Results:
    """The log-probs of all responses, arranged as they come. In `folder` if there is one, else in memory."""

    def __init__(self, first: Tensor, folder: Path | None, ranks: Ranks) -> None:
        """`first` is that of `_first_responses`."""
        self._first, self._folder, self._ranks = first, folder, ranks
        self._values: dict[str, NDArray[Any]] = {}
        if folder is not None and ranks.local_rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            numpy.save(folder / "first.npy", first[:-1].numpy())

    def add(self, stretch: Stretch) -> None:
        """Put the results of `stretch` into their places."""
        if self._folder is not None and self._ranks.local_rank > 0:
            return
        for name in ("logps", "seen"):
            values = getattr(stretch, name).numpy()
            if name not in self._values:
                self._values[name] = self._new(name, values.dtype)
            self._values[name][stretch.index.numpy()] = values

    def _new(self, name: str, dtype: numpy.dtype[Any]) -> NDArray[Any]:
        shape = (int(self._first[-1]),)
        if self._folder is None:
            return numpy.zeros(shape, dtype)
        path = self._folder / f"{name}.npy"
        values: NDArray[Any] = numpy.lib.format.open_memmap(path, "w+", dtype, shape)
        with path.open("r+b") as file:  # a disk that is full must say so here: a page that it cannot take kills
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return values

    def finished(self) -> Reference:
        """All results. To be called by all ranks."""
        if self._folder is not None:
            self._ranks.gather(None)  # the first rank of each machine has written all
            for path in self._folder.glob("*.npy"):
                self._values[path.stem] = numpy.load(path, mmap_mode="c" if len(self._first) > 1 else None)
        nothing = numpy.zeros(0, numpy.float32)  # without rows
        logps, seen = (torch.from_numpy(self._values.get(name, nothing)) for name in ("logps", "seen"))
        first = torch.from_numpy(self._values["first"]) if "first" in self._values else self._first[:-1]
        return Reference(logps, first, seen)


def find_or_compute(
    launcher: Launcher,
    digest: str,
    rows: Rows,
    tail_weight: float | None,
    cache: Cache,
    report: Callable[[int], None],
    folder: Path | None = None,
) -> Reference:
    """The log-probs of `rows` under the launcher's policy, from the cache or computed: on the CPU, float32 or wider.

    `digest` identifies the policy's weights. The ranks of a machine share the results in `folder`; without one, each
    has them in memory. The other arguments are those of `compute`. If `report` raises `Stopped`, the cache has all
    results so far.
    """
    ranks, first = launcher.ranks, _first_responses(rows)
    key, results = _key(launcher.policy, digest, rows, tail_weight), _Results(first, folder, ranks)
    # 1. Collect what the cache has.
    segments = done = 0  # those done, and their rows
    compiled = launcher.policy.compiled
    while done < len(rows):
        stretch = ranks.of_first(partial(_cached, key, segments, cache))
        if stretch is None:
            break
        results.add(stretch)
        segments, done = segments + int(stretch.size[0]), done + int(stretch.size[1])
    # 2. Compute the rest, and put it into the cache.
    fresh, began = list[Stretch](), time.monotonic()

    def keep() -> None:
        nonlocal segments, began
        if fresh:
            stretch = Stretch.joined(fresh)
            fresh.clear()
            results.add(stretch)
            if ranks.is_first and launcher.policy.compiled == compiled:  # else the key says something else
                with cache.put(_stretch_key(key, segments)) as path:
                    save_file(vars(stretch), path)
            segments, began = segments + int(stretch.size[0]), time.monotonic()

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
    return results.finished()


def _cached(key: str, segments: int, cache: Cache) -> Stretch | None:
    """The stretch of the pass `key` after the first `segments` segments; None if the cache does not have it."""
    return cache.get(_stretch_key(key, segments), lambda path: Stretch(**load_file(path)))


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
    first, done = _first_responses(rows), 0
    results = _Results(first, None, launcher.ranks)
    for scored in _score(launcher, rows, first, tail_weight):
        results.add(scored)
        done += int(scored.size[1])
        report(done)
    return results.finished()


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
    counts = torch.from_numpy(rows.response_counts)
    return torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])


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
