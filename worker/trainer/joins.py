"""The check of joined packs: whether segments that share a pack have the gradients that they have alone.

Row i of a matrix product need not have the same bits beside other rows. On a CPU with one thread it has, from 16 rows
on; a GPU has to be asked. The check computes some segments in one pack and each in its own, and compares all bits.

A CPU with several threads fails on small segments. It is always a single device with a constant budget, so its packs
hold the same segments in every run. There the check allows for rounding.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from worker.trainer.data import Row
from worker.trainer.gradients import Sum, take_gradients
from worker.trainer.hardware import hardware, warn_again
from worker.trainer.model import Policy
from worker.trainer.packing import Segment
from worker.trainer.ranks import Ranks

CANDIDATE_ROWS = 512
"""The check uses the shortest of the first rows, as many as fill a pack."""
VALUES = "values"
"""The name of log-probs or rewards beside those of gradients."""
Outcomes = list[dict[str, Tensor]]
"""For each of some segments its values and its gradients, by name."""
CLOSE = 1e-3
"""Allowed error of a gradient on a CPU with several threads, relative to its largest entry."""


def check(policy: Policy, rows: Sequence[Row], ranks: Ranks) -> None:
    """If several segments in a pack would change their gradients, let packs of `policy` hold one. Uses some `rows`.

    All `ranks` let them if one does.
    """
    if policy.shared and policy.joins and not policy.full:
        _compare(policy, rows, ranks)
    policy.joins = not ranks.any(not policy.joins)
    policy.packing = replace(policy.packing, joined=policy.joins)


def _compare(policy: Policy, rows: Sequence[Row], ranks: Ranks) -> None:
    """Set `policy.joins` by what some `rows` give together and alone. All `ranks` compute the same packs."""
    segments = segments_to_check(policy, rows)
    if len(segments) < 2:
        return
    with disturbed(policy):
        alone = [outcome for segment in segments for outcome in outcomes(policy, [segment])]
        same = _close if policy.device.type == "cpu" and torch.get_num_threads() > 1 else torch.equal
        for count in sorted({2, len(segments)}):  # the smallest pack with several segments, and the largest
            together = outcomes(policy, segments[:count])
            has_room = len(together) == count and len(alone) == len(segments)
            pairs = zip(together, alone, strict=False) if has_room else ()
            policy.joins = policy.joins and all(
                one.keys() == other.keys() and all(same(one[name], other[name]) for name in one) for one, other in pairs
            )
            if ranks.any(not has_room):  # larger packs have none either
                policy.room = sum(segment.tokens for segment in segments[: count - 1])
                break


@contextmanager
def disturbed(policy: Policy) -> Iterator[None]:
    """Within this context the adapter of `policy` has random numbers in its B, always the same.

    A fresh adapter's B is zero, and then so is the gradient of its A. Numbers of any size show a difference.
    """
    adapters = {name: weight for name, weight in policy.trainable().items() if "lora_B" in name}
    before = {name: weight.detach().clone() for name, weight in adapters.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        for weight in adapters.values():
            weight.data.copy_(0.01 * torch.randn(weight.shape, generator=generator, dtype=torch.float32))
        yield
    finally:
        for name, weight in adapters.items():
            weight.data.copy_(before[name])


def segments_to_check(policy: Policy, rows: Sequence[Row]) -> list[Segment]:
    """Some rows as segments that fill a pack. They are small, because differences are likelier in small ones."""
    budget = min(hardware(policy.device).checked_tokens, policy.packing.budget)
    packing = replace(
        policy.packing, joined=policy.joins, budget=budget,
        segment_tokens=min(budget // 4, policy.packing.segment_tokens),
    )  # fmt: skip
    shortest = sorted(range(min(len(rows), CANDIDATE_ROWS)), key=lambda number: rows[number].tokens)
    before = accumulate((rows[number].tokens for number in shortest), initial=0)
    numbers = [number for number, tokens in zip(shortest, before, strict=False) if tokens < budget]
    segments = sorted(packing.segments(rows, numbers), key=lambda segment: segment.tokens)
    return next(packing.groups(segments), [])


def outcomes(policy: Policy, segments: Sequence[Segment]) -> Outcomes:
    """The values and the gradients of each of `segments`, computed in one pack. None at all without memory for it.

    Gradients that are not kept apart are those of the first.
    """
    pack = policy.packing.build(segments).to(policy.device)
    sums: list[Sum] = [{} for _ in segments]
    try:
        with policy.shards.together(backward=True), policy.segment_gradients.added_to(sums, pack.extents):
            values, total = policy.outcome(pack)
            if total.requires_grad:
                total.backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:
        warn_again()
        take_gradients({}, policy.trainable().values())
        return []
    take_gradients(sums[0], policy.trainable().values())
    names = {parameter: name for name, parameter in policy.trainable().items()}
    return [
        {VALUES: values.detach()[extent.responses]} | {names[parameter]: total[parameter] for parameter in total}
        for extent, total in zip(pack.extents, sums, strict=True)
    ]


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= CLOSE * other.abs().max())
