"""Before anything trains: this engine's log-probs held against what the model itself says, one response at a time.

The engine computes them in the fastest of these ways that is exact for the model at hand: prompts shared by their
responses; padded batches; one text at a time; and the same with the logits that the model makes itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from worker.trainer.attention import window_sizes
from worker.trainer.data import Row
from worker.trainer.errors import UserError, first_line
from worker.trainer.events import Events
from worker.trainer.model import Policy
from worker.trainer.packing import trees

CHECKED_FROM, CHECKED_ROWS = 256, 3
"""The check takes the shortest few of so many first rows."""


def check(policy: Policy, rows: Sequence[Row], events: Events) -> None:
    """Choose the fastest way to the log-probs of `rows` that is exact, and tell of those that are not.

    Exact is 1e-4 of the log-probs of some of the first rows; on a GPU, whose logits are rounded to bfloat16, what that
    allows. Raises `UserError` for a model that no way is exact for: wrong log-probs must not train anything.
    """
    numbers = _to_check(policy, rows)
    with torch.no_grad():
        expected = torch.cat([_own_logps(policy, rows[number]) for number in numbers])
        if not expected.isfinite().all():
            message = f"The log-probs of '{policy.name}' are not finite before any training."
            raise UserError("loss_not_finite", message, "model")
        scored = torch.tensor([sum(r.scored) for number in numbers for r in rows[number].responses])
        tolerance = _tolerance(expected, scored.to(policy.device))
        for number in numbers:
            _require_sane(policy, rows[number])
        for told, settings in _ways(policy):
            for name, value in settings.items():
                setattr(policy, name, value)
            reason = _why_off(policy, rows, numbers, expected, tolerance)
            if reason is None:
                return
            events.message(f"{told}: {reason}.", level="warn")
    message = f"The log-probs of '{policy.name}' cannot be computed exactly by this engine."
    raise UserError("unsupported_model", message, "model")


def _ways(policy: Policy) -> Iterator[tuple[str, dict[str, bool]]]:
    """Settings of the policy, from the fastest on; and what is said where they are not exact."""
    if policy.shared:
        yield "Prompts are not shared", {"shared": True}
    if not policy.one_by_one:
        yield "Texts are not batched", {"shared": False}
    yield "The model makes its logits itself, which needs more memory", {"shared": False, "one_by_one": True}
    yield "Nothing is left to try", {"own_head": True}


def _to_check(policy: Policy, rows: Sequence[Row]) -> list[int]:
    """The rows that are looked at: the shortest few of the first ones, and where the model has a window, one that is
    longer, since shorter ones do not show it.
    """
    numbers = sorted(range(min(len(rows), CHECKED_FROM)), key=lambda n: rows[n].tokens)
    chosen, widest = numbers[:CHECKED_ROWS], max(window_sizes(policy.causal), default=None)
    if widest is not None and numbers:
        longer = (n for n in numbers if len(rows[n].prompt) + len(rows[n].responses[0].ids) > widest)
        chosen.append(next(longer, numbers[-1]))
    return list(dict.fromkeys(chosen))


def _tolerance(expected: Tensor, scored: Tensor) -> Tensor:
    """How far off a log-prob of `scored` tokens may be."""
    if expected.device.type == "cuda":  # the model's own logits are bfloat16: an eighth apart at 16 and above
        return 0.01 * expected.abs() + 0.2 * scored.sqrt()  # errors of tokens are independent
    return 1e-4 * expected.abs().clamp(min=1)


def _close(values: Tensor, expected: Tensor, tolerance: Tensor) -> bool:
    return bool(((values.float() - expected).abs() <= tolerance).all())


def _why_off(
    policy: Policy, rows: Sequence[Row], numbers: list[int], expected: Tensor, tolerance: Tensor
) -> str | None:
    """The reason why the policy's log-probs are wrong as it computes them now; None where they are right."""
    packing = replace(policy.packing, merge=False)
    pack = packing.build(trees(rows, numbers, packing.budget, merge=False)).to(policy.device)
    try:
        found = policy.score(pack).responses
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the code of a model does not put up with
        return first_line(error)
    return None if _close(found, expected, tolerance) else "the log-probs of the first rows would differ"


def _own_logps(policy: Policy, row: Row) -> Tensor:
    """The log-probs of each response of `row` by the model's own forward pass, one at a time."""
    found = []
    for response in row.responses:
        ids = torch.tensor([*row.prompt, *response.ids], device=policy.device)
        scored = torch.tensor(response.scored, device=policy.device, dtype=torch.bool)
        at = torch.arange(len(row.prompt), len(ids), device=policy.device)[scored] - 1
        at = at[at >= 0]
        logps = _own_logits(policy, ids)[at].float().log_softmax(-1).gather(1, ids[at + 1, None])
        found.append(logps.sum())
    return torch.stack(found)


def _own_logits(policy: Policy, ids: Tensor) -> Tensor:
    try:
        with policy.own_attention_in_use():
            return policy.logits(ids)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        message = f"'{policy.name}' cannot compute a text of {len(ids)} tokens: {first_line(error)}."
        raise UserError("unsupported_model", message, "model") from error


def _require_sane(policy: Policy, row: Row) -> None:
    """Refuse a model that draws at random, and one in which a token changes the prediction of tokens before it."""
    ids = torch.tensor([*row.prompt, *row.responses[0].ids], device=policy.device)
    half, others = len(ids) // 2, ids[ids != ids[-1]]
    if half < 1 or not len(others):
        return
    changed = torch.cat([ids[:half], others[:1].expand(len(ids) - half)])  # as long: some encodings depend on that
    first, again, after = (_own_logits(policy, each)[half - 1].float().log_softmax(-1) for each in (ids, ids, changed))
    tolerance = _tolerance(first, torch.ones_like(first))
    if not _close(again, first, tolerance):
        message = f"'{policy.name}' gives other log-probs each time: something in it draws at random while it trains."
        raise UserError("unsupported_model", message, "model")
    if not _close(after, first, tolerance):
        message = f"'{policy.name}' is not a causal model: what follows a token changes what it predicts."
        raise UserError("unsupported_model", message, "model")
