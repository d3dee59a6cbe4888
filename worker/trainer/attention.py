"""Attention over packs: which position may look at which, and the kernels that compute it.

`tree_attention` is registered with transformers' attention interface under `NAME`; a model that uses that
interface hands it queries, keys and values, its scaling, sliding window and soft-capping, and the `tree` that its
caller passed to `forward`. Nothing of the model is patched.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from worker.trainer.packing import Pack

NAME = "dpo_tree"
SHAREABLE_LAYERS = {"full_attention", "sliding_attention"}
SHAREABLE_ROPE = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings in which a position's encoding depends on that position alone."""


class TreeMask:
    """The mask of a pack, made once for each sliding window that the model's layers have.

    A position sees what comes before it in its own tree, of the prompt and of its own response, no further back
    than the window: by distance of positions, not of places in the pack.
    """

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        self._trees: dict[int | None, list[tuple[int, int, Tensor | None]]] = {}
        self._blocks: dict[int | None, Any] = {}

    def prepare(self, windows: set[int | None]) -> None:
        """Make the masks for `windows` now: on a GPU before the layers run, which may be compiled."""
        if self.pack.ids.is_cuda:
            for window in windows:
                self.blocks(window)

    def trees(self, window: int | None = None) -> list[tuple[int, int, Tensor | None]]:
        """(first place, place behind the last, mask [1, 1, n, n]) of each tree of a pack of one sequence.

        The mask is None where a tree is a plain causal text.
        """
        if window not in self._trees:
            visible, first = self._visibility(window), self.pack.tree.new_zeros(())
            self._trees[window] = []
            for start, stop in self.pack.spans:
                places = torch.arange(start, stop, device=first.device)
                plain = int(self.pack.branch[0, start:stop].max()) <= 1 and (window is None or stop - start <= window)
                mask = None if plain else visible(first, first, places[:, None], places[None, :])[None, None]
                self._trees[window].append((start, stop, mask))
        return self._trees[window]

    def blocks(self, window: int | None = None) -> Any:
        """The same for FlexAttention: a block mask."""
        if window not in self._blocks:
            from torch.nn.attention.flex_attention import create_block_mask

            batch, length = self.pack.ids.shape
            visible = self._visibility(window)
            self._blocks[window] = create_block_mask(visible, batch, None, length, length, self.pack.ids.device)
        return self._blocks[window]

    def _visibility(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        return visibility(self.pack.tree, self.pack.branch, self.pack.positions, window)


def visibility(
    tree: Tensor, branch: Tensor, positions: Tensor, window: int | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's `mask_mod` for tensors [B, T]: whether query place q sees key place k of sequence b.

    Padding sees itself only, so that no row of the softmax is empty.
    """

    def mask_mod(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (tree[b, q] == tree[b, k]) & (tree[b, k] >= 0) & (q >= k)
        seen = same & ((branch[b, k] == 0) | (branch[b, q] == branch[b, k]))
        if window is not None:
            seen = seen & (positions[b, q] - positions[b, k] < window)
        return seen | (q == k)

    return mask_mod


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,  # the tree is the mask; some models pass this by name
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    s_aux: Tensor | None = None,
    tree: TreeMask | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(Q Kᵀ · scaling) V over the pack of `tree`; with `s_aux` [H], an attention sink in each head.

    Shapes: `query` [B, H, T, D]; `key`, `value` [B, H or fewer, T, D]. Returns [B, T, H, D]. Dropout is off, always:
    one mask is drawn for a prompt, and it would be that of all its responses.
    """
    if tree is None:
        raise ValueError("the model does not hand options of its forward pass to its attention")
    if query.device.type == "cuda":
        attended = _flex(query, key, value, tree.blocks(sliding_window), scaling, softcap, s_aux)
    else:
        # Tree by tree: most of a pack's dense mask would be zeros, which SDPA computes all the same.
        parts = [
            _attend(query[:, :, i:j], key[:, :, i:j], value[:, :, i:j], mask, scaling, softcap, s_aux)
            for i, j, mask in tree.trees(sliding_window)
        ]
        attended = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
    return attended.transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention within one tree, causal where it has no mask.

    SDPA has no scores c · tanh(s / c), and no sink, which takes part in the softmax and has no value: the scores are
    made then.
    """
    grouped = query.shape[1] != key.shape[1]
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril() if mask is None else mask
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : key.shape[2]] @ value


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Any,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    options = {"block_mask": blocks, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    options["score_mod"] = None if softcap is None else _cap(softcap)
    attended: Tensor
    if sinks is None:
        attended = _compiled_flex()(query, key, value, **options)
        return attended
    # Σ exp(s) becomes Σ exp(s) + exp(sink): the output times exp(lse) / (exp(lse) + exp(sink)) = σ(lse − sink).
    from torch.nn.attention.flex_attention import AuxRequest

    attended, found = _compiled_flex()(query, key, value, return_aux=AuxRequest(lse=True), **options)
    weight = torch.sigmoid(found.lse - sinks.to(found.lse.dtype)[None, :, None])
    return attended * weight[..., None].to(attended.dtype)


@cache
def _cap(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def score_mod(score: Tensor, _b: Tensor, _head: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@cache
def _compiled_flex() -> Any:
    """FlexAttention's fused kernels. Each width of a pack and each window compiles once."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    return torch.compile(flex_attention, dynamic=False)


def padding_mask(pack: Pack) -> Tensor:
    """[B, T], one where there is a token: the mask of an ordinary padded batch."""
    return (pack.tree >= 0).long()


def why_not_shared(model: Any) -> str | None:
    """Why the layers of `model` cannot take a tree; None where they can.

    Positions that restart are only right where a position's encoding depends on that position alone, and a mask
    is only seen by layers that ask the attention interface. What this does not know, the check on the first
    rows of a run finds out.
    """
    config = model.config.get_text_config()
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        return "its attention does not go through transformers' attention interface"
    if getattr(model, "_is_stateful", False):
        return "it has recurrent layers"
    others = set(getattr(config, "layer_types", None) or []) - SHAREABLE_LAYERS
    if others:
        return f"it has layers of the kind '{sorted(others)[0]}'"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention looks ahead"
    ropes = rope_kinds(model) - SHAREABLE_ROPE
    if ropes:
        return f"its rotary embedding ('{sorted(ropes)[0]}') depends on the length of the sequence"
    return why_not_batched(model)


def why_not_batched(model: Any) -> str | None:
    """Why even the longest text of a padded batch would change the others; None where it does not."""
    config = model.config.get_text_config()
    if not rope_kinds(model) <= SHAREABLE_ROPE:
        return "its rotary embedding depends on the longest of them"
    if any(name.startswith("index_top") for name in vars(config)):
        return "it chooses what a token attends to, and where several places draw, their number decides"
    return None


def windows(model: Any) -> set[int | None]:
    """The sliding windows of the layers of `model`; None for those that see everything."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    return {window if kind == "sliding_attention" else None for kind in kinds}


def window_sizes(model: Any) -> set[int]:
    """Whatever in the configuration of `model` may bound how far a token looks back, in tokens."""
    config = model.config.get_text_config()
    return {
        value
        for name, value in config.to_dict().items()
        if re.search(r"window|chunk_size|local_attention", name) and type(value) is int and value > 1
    }


def rope_kinds(model: Any) -> set[str]:
    """The kinds of rotary embeddings of the layers of `model`; "default" where it has none."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    by_layer = bool(rope) and all(isinstance(value, dict) for value in rope.values())
    return {parameters.get("rope_type", "default") for parameters in (rope.values() if by_layer else [rope])}


AttentionInterface.register(NAME, tree_attention)
