"""Attention over packs: which token sees which, and the kernels that compute it.

`tree_attention` is registered with transformers' attention interface under the name `TREE_ATTENTION`. A model that
uses this interface passes it queries, keys, values, scaling, sliding window and soft cap. The keyword `tree` of the
model's `forward` reaches it too. No model code is patched.

A slot is an index into a pack. A position is the index of a token in its own text: prompt and one response.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from worker.trainer.packing import Pack

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TREE_ATTENTION = "dpo_tree"
SHAREABLE_LAYERS = {"full_attention", "sliding_attention"}
SHAREABLE_ROPE = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings that encode a position independently of the length of the sequence."""


class TreeMask:
    """The attention mask of a pack. It is built once for each sliding window that the model's layers have.

    A token sees the earlier tokens of its tree that belong to the prompt or to its own response. The sliding window
    counts distance in positions, not in slots of the pack.
    """

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        self._tree_masks: dict[int | None, list[tuple[int, int, Tensor | None]]] = {}
        self._block_masks: dict[int | None, BlockMask] = {}

    def prepare(self, windows: set[int | None]) -> None:
        """On a GPU, build the masks for `windows` before the layers run: the layers may be compiled."""
        if self.pack.ids.is_cuda:
            for window in windows:
                self.block_mask(window)

    def tree_masks(self, window: int | None = None) -> list[tuple[int, int, Tensor | None]]:
        """(start slot, end slot, mask [1, 1, n, n]) of each tree of n tokens, for a pack of one sequence.

        The mask is None if plain causal attention is right for the tree.
        """
        if window not in self._tree_masks:
            visible, batch_index = self._visibility(window), self.pack.tree.new_zeros(())
            self._tree_masks[window] = []
            for start, stop in self.pack.spans:
                slots = torch.arange(start, stop, device=batch_index.device)  # (n,)
                # One response at most, and the window spans the whole text.
                plain = int(self.pack.branch[0, start:stop].max()) <= 1 and (window is None or stop - start <= window)
                mask = None if plain else visible(batch_index, batch_index, slots[:, None], slots[None, :])[None, None]
                self._tree_masks[window].append((start, stop, mask))
        return self._tree_masks[window]

    def block_mask(self, window: int | None = None) -> "BlockMask":
        """The same mask as a FlexAttention block mask, for a whole pack."""
        if window not in self._block_masks:
            from torch.nn.attention.flex_attention import create_block_mask

            batch, length = self.pack.ids.shape
            visible = self._visibility(window)
            self._block_masks[window] = create_block_mask(visible, batch, None, length, length, self.pack.ids.device)
        return self._block_masks[window]

    def _visibility(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        return visibility(self.pack.tree, self.pack.branch, self.pack.positions, window)


def visibility(
    tree: Tensor, branch: Tensor, positions: Tensor, window: int | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's `mask_mod` over tensors [B, T]: whether query slot q sees key slot k of sequence b.

    Every slot sees itself. Padding sees nothing else, and no row of the softmax is empty.
    """

    def mask_mod(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        earlier = (tree[b, q] == tree[b, k]) & (tree[b, k] >= 0) & (q >= k)  # same tree, not padding, causal
        visible = earlier & ((branch[b, k] == 0) | (branch[b, q] == branch[b, k]))  # the prompt or the own response
        if window is not None:
            visible = visible & (positions[b, q] - positions[b, k] < window)
        return visible | (q == k)

    return mask_mod


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,  # unused: `tree` is the mask. Some models pass this by name
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    s_aux: Tensor | None = None,
    tree: TreeMask | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """softmax(Q Kᵀ · scaling) V under the mask `tree`. `s_aux` [H] adds an attention sink to each head.

    Shapes: `query` [B, H, T, D]; `key`, `value` [B, G, T, D] with G ≤ H heads (grouped queries). Returns [B, T, H, D].
    There is never dropout: one dropout mask for a shared prompt would correlate all its responses. Raises
    `ValueError` if the model does not pass `tree` on.
    """
    if tree is None:
        raise ValueError("the model does not pass keyword arguments on to its attention")
    if query.device.type == "cuda":
        attended = _flex(query, key, value, tree.block_mask(sliding_window), scaling, softcap, s_aux)
    else:
        # Tree by tree: SDPA would also compute the masked blocks between trees, most of a dense mask.
        outputs = [
            _attend(query[:, :, i:j], key[:, :, i:j], value[:, :, i:j], mask, scaling, softcap, s_aux)
            for i, j, mask in tree.tree_masks(sliding_window)
        ]
        padding = query.shape[2] - tree.pack.tokens
        if padding:
            outputs.append(query.new_zeros(*query.shape[:2], padding, value.shape[-1]))
        attended = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
    return attended.transpose(1, 2).contiguous(), None  # (B, H, T, D) -> (B, T, H, D)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention within one tree of n tokens, [B, H, n, D]. Without a mask it is causal.

    SDPA has neither soft-capped scores c · tanh(s / c) nor sinks, which join the softmax but have no value. With
    either of them the scores are computed here.
    """
    grouped = query.shape[1] != key.shape[1]
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)  # (B, H, n, D)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)  # (B, H, n, n)
    visible = torch.ones_like(scores[0, 0], dtype=torch.bool).tril() if mask is None else mask
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        # The sink is one more key: (B, H, n, n + 1).
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : key.shape[2]] @ value


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: "BlockMask",
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """FlexAttention over a whole pack, [B, H, T, D]."""
    options: dict[str, object] = {
        "block_mask": block_mask,
        "scale": scaling,
        "enable_gqa": query.shape[1] != key.shape[1],
        "score_mod": None if softcap is None else _cap(softcap),
    }
    attended: Tensor
    if sinks is None:
        attended = _compiled_flex()(query, key, value, **options)
        return attended
    # A sink turns the denominator Σ exp(s) into Σ exp(s) + exp(sink).
    # With lse = log Σ exp(s) the output is scaled by exp(lse) / (exp(lse) + exp(sink)) = σ(lse − sink).
    from torch.nn.attention.flex_attention import AuxRequest

    attended, aux = _compiled_flex()(query, key, value, return_aux=AuxRequest(lse=True), **options)
    weight = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[None, :, None])  # (B, H, T)
    return attended * weight[..., None].to(attended.dtype)


@cache
def _cap(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def score_mod(score: Tensor, _b: Tensor, _head: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@cache
def _compiled_flex() -> Callable[..., Any]:
    """FlexAttention's fused kernels. They are compiled once for each pack width and window."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    return torch.compile(flex_attention, dynamic=False)


def padding_mask(pack: Pack) -> Tensor:
    """[B, T], 1 for a token and 0 for padding: the usual attention mask of a padded batch."""
    return (pack.tree >= 0).long()


def why_not_shared(model: PreTrainedModel) -> str | None:
    """The reason why responses cannot share their prompt in `model`; None if they can.

    Two things are needed. The encoding of a position must depend on this position alone, because positions restart
    within a pack. The layers must use the attention interface, because only then they see the tree's mask. A model
    that passes here wrongly is caught by the check of `exactness` before training.
    """
    config = model.config.get_text_config()
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        return "its attention does not go through transformers' attention interface"
    if getattr(model, "_is_stateful", False):
        return "it has recurrent layers"
    unshareable = set(getattr(config, "layer_types", None) or []) - SHAREABLE_LAYERS
    if unshareable:
        return f"it has layers of the kind '{sorted(unshareable)[0]}'"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is bidirectional"
    unshareable_ropes = rope_types(model) - SHAREABLE_ROPE
    if unshareable_ropes:
        return f"its rotary embedding ('{sorted(unshareable_ropes)[0]}') depends on the length of the sequence"
    return why_not_batched(model)


def why_not_batched(model: PreTrainedModel) -> str | None:
    """The reason why the texts of a padded batch would change each other's log-probs; None if they do not."""
    config = model.config.get_text_config()
    if not rope_types(model) <= SHAREABLE_ROPE:
        return "its rotary embedding depends on the longest text in the batch"
    if any(name.startswith("index_top") for name in vars(config)):
        return "its sparse attention breaks ties depending on the length of the sequence"
    return None


def sliding_windows(model: PreTrainedModel) -> set[int | None]:
    """The sliding windows of the layers of `model`, in tokens; None for layers with full attention."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    return {window if layer_type == "sliding_attention" else None for layer_type in layer_types}


def window_sizes(model: PreTrainedModel) -> set[int]:
    """All values in the configuration of `model` that may limit how far a token looks back, in tokens."""
    config = model.config.get_text_config()
    return {
        value
        for name, value in config.to_dict().items()
        if re.search(r"window|chunk_size|local_attention", name) and type(value) is int and value > 1
    }


def rope_types(model: PreTrainedModel) -> set[str]:
    """The types of rotary embeddings in the layers of `model`; "default" for a model without any."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    by_layer = bool(rope) and all(isinstance(value, dict) for value in rope.values())  # one entry for each layer type
    return {parameters.get("rope_type", "default") for parameters in (rope.values() if by_layer else [rope])}


AttentionInterface.register(TREE_ATTENTION, tree_attention)
