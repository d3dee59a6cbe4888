"""Compiled layers: when they repay their compilation, and the check that they compute the same.

torch.compile fuses the elementwise operations of a layer: norms, residuals, rotary embeddings, activations. On a GPU
they are expected to take a quarter of an uncompiled step ("A step on an H100" in docs/engine.md). A layer also keeps
less for its backward pass, because fused operations are computed again. No matrix product is.

Compiled numbers may differ in their last bits. The choice therefore depends on the job and on the kind of device, and
not on measured times.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import inf, sqrt

import torch

from worker.trainer import joins, throughput
from worker.trainer.data import Row
from worker.trainer.distributed import is_peer_loss
from worker.trainer.errors import first_line
from worker.trainer.events import Events
from worker.trainer.hardware import hardware
from worker.trainer.linears import has_experts
from worker.trainer.model import Policy
from worker.trainer.packing import Segment
from worker.trainer.plan import Stage
from worker.trainer.ranks import Ranks

ERROR, ERROR_IN_16_BITS = 1e-3, 0.1
"""Allowed norm of the difference to uncompiled log-probs and gradients, relative to their norm."""


def choose(policy: Policy, stage: Stage, events: Events, ranks: Ranks) -> None:
    """Compile the layers of `policy` for `stage` if it asks for that, or is long enough to repay it.

    Layers that cannot be compiled, or compute something else, run uncompiled, and a warning says so.
    """
    wanted = stage.hyperparameters.compile
    if wanted is None:
        wanted = _repays(policy, stage)
    if wanted == policy.compiled:
        return
    policy.compiled = wanted
    if not wanted:
        return
    events.message("The layers of the model are compiled. This takes about a minute, and makes steps faster.")
    check(policy, stage, events, ranks)


def check(policy: Policy, stage: Stage, events: Events, ranks: Ranks) -> None:
    """Let the compiled layers of `policy` run uncompiled, with a warning, if they cannot be used."""
    joins_before = policy.joins
    reasons = ranks.gather(_why_wrong(policy, stage.train))
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is None:
        joins.check(policy, stage.train, ranks)
        if joins_before and not policy.joins:  # uncompiled layers in full packs are faster
            reason = "segments that share a pack would change each other's gradients"
    if reason is not None:
        policy.compiled, policy.joins = False, joins_before
        policy.packing = replace(policy.packing, joined=joins_before)
        events.message(f"The layers of the model are not compiled: {reason}.", level="warn")


def _repays(policy: Policy, stage: Stage) -> bool:
    """Whether `stage` has so much to compute that faster steps save more time than the compilation takes."""
    if not policy.shared or policy.is_divided or policy.has_dropout or has_experts(policy.causal):
        return False
    rows = stage.steps * stage.batch_size
    tokens = rows * stage.train.all_tokens // len(stage.train) + rows * stage.written_tokens
    flops = throughput.needed_flops(policy, throughput.layer_weights(policy.causal), tokens, 0)
    return flops >= hardware(policy.device).compiled_from


def _why_wrong(policy: Policy, rows: Sequence[Row]) -> str | None:
    """The reason why the compiled layers of `policy` cannot be used; None if they compute what uncompiled ones do.

    Compares some `rows` in a pack of several segments and in one of a single segment, with and without gradients. Each
    of these is compiled apart.
    """
    segments = joins.segments_to_check(policy, rows)[:2]
    allowed = ERROR if policy.autocast_dtype is None else ERROR_IN_16_BITS
    try:
        with joins.disturbed(policy):
            groups = [segments[:count] for count in range(1, len(segments) + 1)]
            compiled = [_outcomes(policy, group) for group in groups]
            policy.compiled = False
            plain = [_outcomes(policy, group) for group in groups]
            policy.compiled = True
        if not all(outcome for pair in compiled + plain for outcome in pair):
            return "there is no memory to check them"
        difference = max(
            _difference(one, other)
            for ours, theirs in zip(compiled, plain, strict=True)
            for one, other in zip(ours, theirs, strict=True)
        )
    except torch.OutOfMemoryError:
        return "there is no memory to check them"
    except Exception as error:
        if is_peer_loss(error):
            raise
        return first_line(error)
    if not difference <= allowed:
        return f"their log-probs or gradients differ by {difference:.2g} of those of uncompiled layers"
    return None


def _outcomes(policy: Policy, segments: Sequence[Segment]) -> tuple[joins.Outcomes, joins.Outcomes]:
    """The outcomes of a pack of `segments`: with gradients, and without."""
    with torch.no_grad():
        without = joins.outcomes(policy, segments)
    return joins.outcomes(policy, segments), without


def _difference(ours: joins.Outcomes, theirs: joins.Outcomes) -> float:
    """The larger relative difference: that of all values, or that of all gradients. Infinite if there are others."""
    squares = defaultdict[bool, list[float]](lambda: [0.0, 1e-60])  # of the difference and of `theirs`
    for one, other in zip(ours, theirs, strict=True):
        if one.keys() != other.keys():
            return inf
        for name, values in other.items():
            sums = squares[name == joins.VALUES]
            sums[0] += float((one[name] - values).double().square().sum())
            sums[1] += float(values.double().square().sum())
    return max(sqrt(mine / whole) for mine, whole in squares.values())
