"""Whether a model ever learned the control tokens of its texts."""

from collections.abc import Iterable

import torch
from torch import Tensor

from worker.trainer.tokenizer import Tokenizer

ALIKE, SMALL = 0.999, 1e-3


def untrained(tokenizer: Tokenizer, used: Iterable[int], embeddings: Tensor) -> list[str]:
    """The control tokens among `used` that a model never learned, by their rows of its `embeddings` [V, H].

    Such rows are as they were drawn or filled at the start: next to nothing, or the same as those of other control
    tokens.
    """
    special = [n for n, token in tokenizer.added_tokens_decoder.items() if token.special and n < len(embeddings)]
    if not special:
        return []
    rows = embeddings[special].detach().float()
    sizes = torch.linalg.vector_norm(embeddings.detach(), dim=1, dtype=torch.float32)
    norms = rows.norm(dim=1).clamp(min=1e-12)
    alike = (rows @ rows.t()) / (norms[:, None] * norms) > ALIKE
    alike &= (norms[:, None] / norms - 1).abs() < 1 - ALIKE
    lost = (alike.sum(1) > 1) | (norms < SMALL * sizes.median())
    wanted = set(used)
    found = [number for number, gone in zip(special, lost.tolist(), strict=True) if gone and number in wanted]
    return [str(tokenizer.convert_ids_to_tokens(number)) for number in found]
