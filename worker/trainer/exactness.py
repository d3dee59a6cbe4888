"""The check before training: the engine's log-probs against the model's own forward pass, one response at a time.

The engine has five ways to compute log-probs. From fast to slow:

1. Responses share their prompt, and one kernel computes the attention of a pack (on a GPU).
2. Responses share their prompt, and attention is computed tree by tree.
3. Each response is its own text in a padded batch.
4. One text at a time.
5. One text at a time, with the model's own logits.

The check picks the fastest way that is exact. The kernel of the first way is also compared with the second way, in
every layer, forward and backward.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isnan

import torch
from torch import Tensor

from worker.trainer import joins
from worker.trainer.attention import window_sizes
from worker.trainer.data import Row
from worker.trainer.distributed import is_peer_loss
from worker.trainer.errors import UserError, first_line
from worker.trainer.events import Events
from worker.trainer.model import Policy
from worker.trainer.packing import Segment, trees
from worker.trainer.ranks import Ranks

KERNEL_ERROR = 3.0
"""Allowed error of the attention kernel, relative to that of attention tree by tree. A wrong mask has hundreds."""
HIDDEN_ERROR = 0.05
"""Allowed error of a token in 16 bits, in nats, beside the steps of its logits: hidden states are rounded too."""
LONG_ROW = 512
"""Tokens of a row that shows the kernel's full blocks."""
CANDIDATE_ROWS, CHECKED_ROWS = 256, 3
"""The check uses the `CHECKED_ROWS` shortest of the first `CANDIDATE_ROWS` rows."""


def check(policy: Policy, rows: Sequence[Row], events: Events, ranks: Ranks | None = None) -> None:
    """Set `policy` to the fastest exact way to compute log-probs, judged by some of `rows`. Warn of each inexact way.

    On a CPU, exact means within 1e-4, relative for log-probs above 1 in size. On a GPU the tolerance allows for logits
    in bfloat16. Raises `UserError` for a model without an exact way: wrong log-probs must not train anything.
    """
    numbers = _rows_to_check(policy, rows)
    with torch.no_grad(), policy.own_attention_in_use():
        # 1. The model's own log-probs, and how much they may differ.
        own = [_own_logps(policy, rows[number]) for number in numbers]
        expected, tolerance = (torch.cat(parts) for parts in zip(*own, strict=True))  # (responses,)
        if not expected.isfinite().all():
            message = f"The log-probs of '{policy.name}' are not finite before any training."
            raise UserError("loss_not_finite", message, "model")
        # 2. A model that draws at random or looks ahead cannot be computed exactly.
        for number in numbers:
            _require_deterministic_and_causal(policy, rows[number])
    with torch.no_grad():
        # 3. The first way whose log-probs agree.
        for consequence, settings in _ways(policy):
            for name, value in settings.items():
                setattr(policy, name, value)
            own_reason = _why_inexact(policy, rows, numbers, expected, tolerance)
            reasons = [own_reason] if ranks is None else ranks.gather(own_reason)  # all ranks compute the same way
            reason = next((reason for reason in reasons if reason is not None), None)
            if reason is None:
                break
            events.message(f"{consequence}: {reason}.", level="warn")
        else:
            message = f"The log-probs of '{policy.name}' cannot be computed exactly by this engine."
            raise UserError("unsupported_model", message, "model")
    # 4. In which order a pass uses a sharded base.
    if policy.is_divided and (policy.one_by_one or policy.own_logits):
        message = f"The model '{policy.name}' cannot be sharded: its texts are computed one by one."
        raise UserError("unsupported_model", f"{message} Set 'shard' to false.", "parallel.shard")
    shortest = policy.packing.build([Segment(tuple(trees(rows, numbers[:1], policy.packing.budget)))])
    policy.shards.record(lambda: policy.score(shortest.to(policy.device)).responses)
    for parameter in policy.trainable().values():
        parameter.grad = None
    # 5. Whether segments may share a pack, on all ranks: one may have run out of memory in the check.
    joins.check(policy, rows, ranks or Ranks())


def _ways(policy: Policy) -> Iterator[tuple[str, dict[str, bool]]]:
    """(what the user is told if it is not exact, settings of the policy) of each way, the fastest first."""
    if policy.shared and policy.blocks:
        yield "Attention is computed tree by tree", {"blocks": True}
    if policy.shared:
        yield "Prompts are not shared", {"blocks": False}
    if not policy.one_by_one:
        yield "Texts are not batched", {"shared": False}
    yield "The model computes its own logits, which needs more memory", {"shared": False, "one_by_one": True}
    yield "No other way to compute log-probs is left", {"own_logits": True}


def _rows_to_check(policy: Policy, rows: Sequence[Row]) -> list[int]:
    """The shortest of the first rows. For a model with a window, also a row longer than it: only such a row shows it.

    For a kernel with blocks, also a row of several blocks. If no row is that long, the longest is taken.
    """
    numbers = sorted(range(min(len(rows), CANDIDATE_ROWS)), key=lambda number: rows[number].tokens)
    checked, widest = numbers[:CHECKED_ROWS], max(window_sizes(policy.causal), default=None)
    if policy.blocks and numbers:  # only a longer row has blocks that need no mask
        checked.append(next((number for number in numbers if rows[number].tokens >= LONG_ROW), numbers[-1]))
    if widest is not None and numbers:
        longer = (number for number in numbers if _text_length(rows[number]) > widest)
        checked.append(next(longer, numbers[-1]))
    return list(dict.fromkeys(checked))


def _text_length(row: Row) -> int:
    """Number of tokens of the prompt and the first response."""
    return len(row.prompt) + len(row.responses[0].ids)


def _tolerance(policy: Policy, expected: Tensor, logits: Tensor, tokens: int) -> Tensor:
    """The allowed error of the log-probs `expected`, which are sums over so many tokens with these own `logits`.

    In 16 bits, logits come in steps: of an eighth between 16 and 32 in bfloat16. The errors of tokens are independent.
    """
    if policy.autocast_dtype is None:
        return 1e-4 * expected.abs().clamp(min=1)
    step = torch.finfo(policy.autocast_dtype).eps * float(logits.abs().max())
    allowed: Tensor = 1e-3 * expected.abs() + tokens**0.5 * (HIDDEN_ERROR + step)
    return allowed


def _close(values: Tensor, expected: Tensor, tolerance: Tensor) -> bool:
    return bool(((values.float() - expected).abs() <= tolerance).all())


def _why_inexact(
    policy: Policy, rows: Sequence[Row], numbers: list[int], expected: Tensor, tolerance: Tensor
) -> str | None:
    """The reason why the policy's log-probs are wrong under its current settings; None if they are right."""
    packing = replace(policy.packing, merge=False)
    pack = packing.build([Segment(tuple(trees(rows, numbers, packing.budget, merge=False)))]).to(policy.device)
    pack.mask.errors = []
    try:
        logps = policy.score(pack).responses
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's code may fail in any way on inputs that it does not support
        if is_peer_loss(error):
            raise
        return first_line(error)
    if not all(error <= KERNEL_ERROR for error in pack.mask.errors):  # also if one is not a number
        worst = max(pack.mask.errors, key=lambda error: (isnan(error), error))
        return f"the attention kernel has {worst:.3g} times the error of attention tree by tree"
    return None if _close(logps, expected, tolerance) else "the log-probs of the first rows would differ"


def _own_logps(policy: Policy, row: Row) -> tuple[Tensor, Tensor]:
    """The log-prob of each response of `row` by the model's own forward pass, and its allowed error, [K] each.

    One text at a time.
    """
    sums, tolerances = [], []
    for response in row.responses:
        ids = torch.tensor([*row.prompt, *response.ids], device=policy.device)  # (T,)
        scored = torch.tensor(response.scored, device=policy.device, dtype=torch.bool)
        # The position before a scored token predicts it. Nothing predicts the first token of a text.
        predictors = torch.arange(len(row.prompt), len(ids), device=policy.device)[scored] - 1
        predictors = predictors[predictors >= 0]
        logits = _own_logits(policy, ids)  # (T, V)
        logps = logits[predictors].float().log_softmax(-1).gather(1, ids[predictors + 1, None])  # (scored tokens, 1)
        sums.append(logps.sum())
        tolerances.append(_tolerance(policy, sums[-1], logits, len(predictors)))
    return torch.stack(sums), torch.stack(tolerances)


def _own_logits(policy: Policy, ids: Tensor) -> Tensor:
    """The model's own logits for one text, [T, V], computed while its own attention is in use."""
    try:
        return policy.logits(ids)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if is_peer_loss(error):
            raise
        message = f"'{policy.name}' cannot compute a text of {len(ids)} tokens: {first_line(error)}."
        raise UserError("unsupported_model", message, "model") from error


def _require_deterministic_and_causal(policy: Policy, row: Row) -> None:
    """Raise `UserError` for a model with random predictions, and for one whose predictions depend on later tokens."""
    ids = torch.tensor([*row.prompt, *row.responses[0].ids], device=policy.device)
    half, others = len(ids) // 2, ids[ids != ids[-1]]
    if half < 1 or not len(others):
        return
    # Replace the second half. The length stays, because some position encodings depend on it.
    changed = torch.cat([ids[:half], others[:1].expand(len(ids) - half)])
    # The predictions at the end of the first half, [V] each: twice for the same text, once for the changed one.
    logits = [_own_logits(policy, text)[half - 1].clone() for text in (ids, ids, changed)]  # [V], without the others
    first, again, after = (values.float().log_softmax(-1) for values in logits)
    tolerance = _tolerance(policy, first, logits[0], 1)
    if not _close(again, first, tolerance):
        message = f"'{policy.name}' gives different log-probs each time: its forward pass draws at random."
        raise UserError("unsupported_model", message, "model")
    if not _close(after, first, tolerance):
        message = f"'{policy.name}' is not a causal model: later tokens change its predictions."
        raise UserError("unsupported_model", message, "model")
