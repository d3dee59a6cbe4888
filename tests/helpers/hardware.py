"""Let the CPU choose as other devices do."""

from collections.abc import Callable
from dataclasses import replace
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.functional import scaled_dot_product_attention

from worker.trainer import attention, hardware


def choose(patch: pytest.MonkeyPatch, **choices: Any) -> None:
    """Change some of the engine's `choices` on a CPU."""
    patch.setitem(hardware.BY_KIND, "cpu", replace(hardware.BY_KIND["cpu"], **choices))


def choose_as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Give the CPU all choices of a GPU: bfloat16, attention over whole packs with masks in blocks, wide sums.

    Layers of tiny models have their adapters within their products too.
    `dense_attention` takes the place of FlexAttention, which is slow where it is not compiled.
    """
    patch.setitem(hardware.BY_KIND, "cpu", replace(hardware.GPU, extended_share=inf))
    patch.setattr(attention, "_compiled_flex", lambda: dense_attention)


def use_own_kernel(patch: pytest.MonkeyPatch) -> None:
    """Let FlexAttention itself compute the packs that have masks in blocks, uncompiled, also with gradients.

    Its backward pass runs on a CPU, but torch does not offer it.
    """
    patch.setattr(attention, "_compiled_flex", lambda: flex.flex_attention)
    patch.setattr(flex, "_validate_device", lambda query, key, value: None)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: flex.BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_aux: object = None,
) -> Any:
    """The attention of FlexAttention, in float32. It reads the blocks of the mask as the kernels do."""
    assert block_mask is not None and enable_gqa == (query.shape[1] != key.shape[1])
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, 1).float() for part in (key, value))
    if score_mod is None and return_aux is None:
        return scaled_dot_product_attention(query.float(), key, value, visible(block_mask), scale=scale).to(query.dtype)
    scores = query.float() @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if score_mod is None else score_mod(scores, None, None, None, None)
    scores = scores.masked_fill(~visible(block_mask), -torch.inf)
    attended = (scores.softmax(-1) @ value).to(query.dtype)
    return attended if return_aux is None else (attended, SimpleNamespace(lse=scores.logsumexp(-1)))


def causal_attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """Takes the place of the kernel over whole packs where its results do not matter, because it is faster."""
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def visible(block_mask: flex.BlockMask) -> Tensor:
    """[T, T]: whether a query (dim 0) sees a key (dim 1), by the lists of blocks, and in partial ones by the mask."""
    length, _ = block_mask.seq_lengths
    size, _ = block_mask.BLOCK_SIZE
    slots = torch.arange(length)
    pairs = block_mask.mask_mod(slots[0], slots[0], slots[:, None], slots[None, :])

    def blocks(counts: Tensor, indices: Tensor) -> Tensor:
        dense = torch.zeros(indices.shape[-2:], dtype=torch.bool)
        for row, (count, columns) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0], strict=True)):
            dense[row, columns[:count].long()] = True
        return dense.repeat_interleave(size, 0).repeat_interleave(size, 1)[:length, :length]

    assert block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None
    full = blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    return full | (blocks(block_mask.kv_num_blocks, block_mask.kv_indices) & pairs)
