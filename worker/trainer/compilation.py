"""Compiled layers: when they repay their compilation, and the check that they compute the same.

torch.compile fuses the elementwise operations of a layer: norms, residuals, rotary embeddings, activations. On a GPU
they take a third of an uncompiled step ("A step on an H100" in docs/engine.md). What a layer keeps for its backward
pass shrinks too, because fused operations are computed again. No matrix product is.

Compiled numbers are rounded less often, so they differ in their last bits. The choice therefore depends on the job and
on the kind of device, and not on measured times.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.trainer import joins, throughput
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
    reasons = ranks.gather(_why_wrong(policy, joins.segments_to_check(policy, stage.train)))
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None:
        policy.compiled = False
        events.message(f"The layers of the model are not compiled: {reason}.", level="warn")
    joins.check(policy, stage.train, ranks)


def _repays(policy: Policy, stage: Stage) -> bool:
    """Whether `stage` has so much to compute that faster steps save more time than the compilation takes."""
    if not policy.shared or policy.is_divided or has_experts(policy.causal):
        return False
    tokens = stage.steps * stage.batch_size * stage.train.all_tokens // len(stage.train)
    flops = throughput.needed_flops(policy, throughput.layer_weights(policy.causal), tokens, 0)
    return flops >= hardware(policy.device).compiled_from


def _why_wrong(policy: Policy, segments: Sequence[Segment]) -> str | None:
    """The reason why the compiled layers of `policy` cannot be used; None if they compute what uncompiled ones do."""
    try:
        with joins.disturbed(policy):
            compiled = joins.outcomes(policy, segments[:2])
            policy.compiled = False
            expected = joins.outcomes(policy, segments[:2])
            policy.compiled = True
    except Exception as error:
        if is_peer_loss(error):
            raise
        return first_line(error)
    allowed = ERROR if policy.autocast_dtype is None else ERROR_IN_16_BITS
    for name in ("log-probs", "gradients"):
        one, other = (_joined(outcome, name == "gradients") for outcome in (compiled, expected))
        if one.shape != other.shape:  # without memory for one of them, nothing is known
            continue
        difference = float((one - other).norm() / other.norm().clamp(min=1e-30))
        if not difference <= allowed:
            return f"their {name} differ by {difference:.2g} of those of uncompiled layers"
    return None


def _joined(outcomes: Sequence[dict[str, Tensor]], gradients: bool) -> Tensor:
    """All values, or all gradients, of some segments in one vector."""
    parts = [
        outcome[name].flatten().double()
        for outcome in outcomes
        for name in sorted(outcome)  # autograd leaves gradients in an order of its own
        if (name != joins.VALUES) == gradients
    ]
    return torch.cat(parts) if parts else torch.zeros(0)
