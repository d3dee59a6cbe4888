"""Which position may look at which, and which models can be given that as a mask."""

from typing import Any

import torch
from torch import Tensor

from worker.trainer.packing import Pack


def tree_mask(pack: Pack) -> Tensor:
    """[B, 1, T, T], true where a query (dim 2) sees a key (dim 3).

    A position sees what comes before it in its own row and is of the prompt or of its own response. Padding sees
    itself only, so that no row of the softmax is empty.
    """
    length = pack.ids.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=pack.ids.device).tril()
    same_row = pack.row[:, :, None] == pack.row[:, None, :]
    seen = (pack.branch[:, None, :] == 0) | (pack.branch[:, :, None] == pack.branch[:, None, :])
    mask = before & same_row & seen & (pack.row >= 0)[:, None, :]
    return (mask | torch.eye(length, dtype=torch.bool, device=mask.device)).unsqueeze(1)


def padding_mask(pack: Pack) -> Tensor:
    """[B, T], one where there is a token: the mask of an ordinary padded batch."""
    return (pack.row >= 0).long()


def why_not_shared(model: Any) -> str | None:
    """Why the layers of `model` cannot take a tree mask; None where they can.

    A caller's mask replaces the model's own, sliding windows included, and positions that restart are only right
    where a position's encoding depends on that position alone. What this does not know, the check on the first
    pack of a run finds out.
    """
    config = model.config.get_text_config()
    if not model._supports_sdpa:
        return "its attention does not run on scaled_dot_product_attention"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "it has sliding-window attention"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return "it has layers other than full attention"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
        return f"its rotary embedding ('{rope['rope_type']}') depends on the length of the sequence"
    return None
