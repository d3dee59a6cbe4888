"""Find the control tokens that a model never learned."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

ALIKE_COSINE = 0.999
"""Two embeddings are alike above this cosine, if their norms also agree to 1 − `ALIKE_COSINE`."""
SMALL_NORM = 1e-3
"""An embedding is untrained if its norm is below this share of the median norm."""


def untrained_control_tokens(tokenizer: Tokenizer, used: Iterable[int], embeddings: Tensor) -> list[str]:
    """The control tokens among the ids `used` that a model never learned, judged by its `embeddings` [V, H].

    Such embeddings still have their initial values. They are almost zero, or equal to those of other control tokens.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = [token_id for token_id, token in added if token.special and token_id < len(embeddings)]
    if not special:
        return []
    rows = embeddings[special].detach().float()  # (S, H)
    all_norms = torch.linalg.vector_norm(embeddings.detach(), dim=1, dtype=torch.float32)  # (V,)
    norms = rows.norm(dim=1).clamp(min=1e-12)  # (S,)
    alike = (rows @ rows.t()) / (norms[:, None] * norms) > ALIKE_COSINE  # (S, S)
    alike &= (norms[:, None] / norms - 1).abs() < 1 - ALIKE_COSINE
    untrained = (alike.sum(1) > 1) | (norms < SMALL_NORM * all_norms.median())  # each embedding is like itself
    used_ids = set(used)
    ids = [token for token, flag in zip(special, untrained.tolist(), strict=True) if flag and token in used_ids]
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in ids]
