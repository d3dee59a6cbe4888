"""Reference log-probs: the policy's own at step 0, computed once, before the first update.

There is no second model and no toggling of adapters. The packing they are computed in depends on the rows only,
never on training settings, so that the same rows always get the same bits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from worker.trainer.data import Row
from worker.trainer.model import Policy


def compute(policy: Policy, rows: list[Row], tick: Callable[[], None]) -> Tensor:
    """log π_ref of every response: [rows, K], float32 or wider, on the CPU. `tick` is called after each pack."""
    logps: dict[int, Tensor] = {}
    with torch.no_grad():
        for pack in policy.packs(rows, list(range(len(rows)))):
            sums = policy.score(pack).responses.cpu().view(len(pack.rows), -1)
            logps.update(zip(pack.rows, sums, strict=True))
            tick()
    return torch.stack([logps[number] for number in range(len(rows))]) if rows else torch.zeros(0, 2)
