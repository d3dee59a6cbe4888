"""Attention over packs: the kernels that compute it, and the models that can use them.

`tree_attention` is registered with transformers' attention interface under the name `TREE_ATTENTION`. A model that
uses this interface passes it queries, keys, values, scaling, sliding window and soft cap. The keyword `tree` of the
model's `forward` reaches it too. No model code is patched.

A slot is an index into a pack. A position is the index of a token in its own text: prompt and one response.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from worker.trainer.hardware import backward_deterministically, configure_compiler, hardware
from worker.trainer.masks import TreeMask
from worker.trainer.packing import Pack

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TREE_ATTENTION = "dpo_tree"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention under some mask, of queries, keys and values [B, H, T, D]."""
SHAREABLE_LAYERS = {"full_attention", "sliding_attention"}
SHAREABLE_ROPE = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings that encode a position independently of the length of the sequence."""


class Decoding(Protocol):
    """The keys and values of prompts and their answers, token by token (see `decoding`)."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        sliding_window: int | None,
        scaling: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """The attention of queries [B, H, 1, D], one of each answer: [B, H, 1, D]. `key` is what the cache returned."""


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
    tree: "TreeMask | Decoding | None" = None,
    **_: object,
) -> tuple[Tensor, None]:
    """softmax(Q Kᵀ · scaling) V under the mask `tree`. `s_aux` [H] adds an attention sink to each head.

    While a model decodes, `tree` has the keys and values of prompts and answers, and computes their attention itself.

    Shapes: `query` [B, H, T, D]; `key`, `value` [B, G, T, D] with G ≤ H heads (grouped queries). Returns [B, T, H, D].
    There is never dropout: one dropout mask for a shared prompt would correlate all its responses. Raises
    `ValueError` if the model does not pass `tree` on.
    """
    if tree is None:
        raise ValueError("the model does not pass keyword arguments on to its attention")
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap}
    if not isinstance(tree, TreeMask):
        return tree.attend(query, key, sliding_window, sinks=s_aux, **options).transpose(1, 2).contiguous(), None
    if torch.is_autocast_enabled(query.device.type):  # float32 weights and rotary embeddings make float32 of some
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not tree.blocks:
        attended = KERNELS.by_tree(query, key, value, tree, sliding_window, sinks=s_aux, **options)
    else:
        block_mask = tree.blocks[sliding_window].block_mask

        def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return _flex(query, key, value, block_mask, sinks=s_aux, **options)

        attended = kernel(query, key, value)
        if tree.errors is not None:

            def exact(query: Tensor, key: Tensor, value: Tensor, heads: slice) -> Tensor:
                sinks = None if s_aux is None else s_aux[heads]
                return _by_tree(query, key, value, tree, sliding_window, sinks=sinks, fused=False, **options)

            tree.errors.append(relative_error(kernel, exact, query, key, value, tree.spans))
    return attended.transpose(1, 2).contiguous(), None  # (B, H, T, D) -> (B, T, H, D)


def relative_error(
    kernel: Attention,
    exact: Callable[[Tensor, Tensor, Tensor, slice], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: tuple[tuple[int, int], ...],
) -> float:
    """The error of `kernel`, relative to the one that plain matrix products have in the same dtype. 1 is as exact.

    `exact` computes attention by matrix products for the queries' heads in a slice. True values are those of `exact` in
    a wider dtype. The error is the largest one of any number: of the results in the slots `spans`, and of the gradients
    of queries, keys and values for a random gradient of the results. (The rule of FlashAttention's own tests, Dao et
    al. 2022.)
    """
    is_token = torch.zeros(query.shape[2], dtype=torch.bool, device=query.device)
    for start, stop in spans:
        is_token[start:stop] = True
    generator = torch.Generator().manual_seed(0)
    shape = (*query.shape[:3], value.shape[-1])
    gradient = torch.randn(shape, generator=generator, dtype=torch.float32).to(query.device) * is_token[:, None]
    wide = torch.float32 if query.dtype.itemsize == 2 else torch.float64

    def outcome(attend: Attention, heads: slice, group: slice, dtype: torch.dtype) -> list[Tensor]:
        parts = (query[:, heads], key[:, group], value[:, group])
        inputs = [part.detach().to(dtype).requires_grad_() for part in parts]
        with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
            attended = attend(*inputs)
        gradients = torch.autograd.grad(attended, inputs, gradient[:, heads].to(attended.dtype))
        return [tensor.to(wide) for tensor in (attended.detach() * is_token[:, None], *gradients)]

    everything = slice(0, query.shape[1])
    own = outcome(kernel, everything, slice(0, key.shape[1]), query.dtype)
    repeats = query.shape[1] // key.shape[1]
    errors, theirs, largest = ([torch.zeros((), device=query.device) for _ in own] for _ in range(3))
    for k in range(key.shape[1]):  # the heads of one key at a time: their scores are large
        heads, group = slice(k * repeats, (k + 1) * repeats), slice(k, k + 1)

        def attend(query: Tensor, key: Tensor, value: Tensor, heads: slice = heads) -> Tensor:
            return exact(query, key, value, heads)

        true, other = (outcome(attend, heads, group, dtype) for dtype in (wide, query.dtype))
        mine = [own[0][:, heads], own[1][:, heads], own[2][:, group], own[3][:, group]]
        for number, (one, theirs_one, right) in enumerate(zip(mine, other, true, strict=True)):
            errors[number] = torch.maximum(errors[number], (one - right).abs().max())
            theirs[number] = torch.maximum(theirs[number], (theirs_one - right).abs().max())
            largest[number] = torch.maximum(largest[number], right.abs().max())
    dtype = torch.finfo(query.dtype)
    ratios = [
        error / (other + dtype.eps * most + dtype.tiny)
        for error, other, most in zip(errors, theirs, largest, strict=True)
    ]
    return float(torch.stack(ratios).max())


def _by_tree(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: TreeMask,
    sliding_window: int | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    *,
    fused: bool = True,
) -> Tensor:
    """Attention tree by tree, [B, H, T, D]. One call of SDPA would also compute the masked blocks between trees.

    Slots outside of all trees get zeros. `fused`: use SDPA where it can compute the attention; else plain matrix
    products.
    """
    masks = tree.tree_masks(sliding_window)
    outputs, slot = list[Tensor](), 0
    for start, stop, mask in [*masks, (query.shape[2], query.shape[2], None)]:
        if start > slot:
            outputs.append(query.new_zeros(*query.shape[:2], start - slot, value.shape[-1]))
        if stop > start:
            slots = slice(start, stop)
            parts = (query[:, :, slots], key[:, :, slots], value[:, :, slots])
            outputs.append(_attend(*parts, mask, scaling, softcap, sinks, fused=fused))
        slot = stop
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]


@dataclass
class _Kernels:
    by_tree: Callable[..., Tensor] = _by_tree


KERNELS = _Kernels()
"""How attention tree by tree is called."""


def keep_trees_uncompiled() -> None:
    """Let the compiler leave attention tree by tree as it is. It would compile anew for the trees of each pack."""
    KERNELS.by_tree = torch.compiler.disable(_by_tree)  # type: ignore[no-untyped-call]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    *,
    fused: bool,
) -> Tensor:
    """Attention within one tree of n tokens, [B, H, n, D]. Without a mask it is causal.

    SDPA has neither soft-capped scores c · tanh(s / c) nor sinks, which join the softmax but have no value. With
    either of them the scores are computed here.
    """
    repeats, fused = query.shape[1] // key.shape[1], fused and softcap is None and sinks is None
    # With groups and a mask, SDPA has no kernel on a GPU that saves memory.
    if not fused or (repeats > 1 and mask is not None and hardware(query.device).half):
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)  # (B, H, n, D)
    if fused:
        grouped = query.shape[1] != key.shape[1]
        attended = scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        backward_deterministically(attended)
        return attended
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
        "score_mod": None if softcap is None else _cap(softcap, query.device),
    }
    attended: Tensor
    if sinks is None:
        attended = _flex_attention()(query, key, value, **options)
        return attended
    # A sink turns the denominator Σ exp(s) into Σ exp(s) + exp(sink).
    # With lse = log Σ exp(s) the output is scaled by exp(lse) / (exp(lse) + exp(sink)) = σ(lse − sink).
    from torch.nn.attention.flex_attention import AuxRequest

    attended, aux = _flex_attention()(query, key, value, return_aux=AuxRequest(lse=True), **options)
    weight = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[None, :, None])  # (B, H, T)
    return attended * weight[..., None].to(attended.dtype)


@cache
def _cap(softcap: float, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    cap = torch.tensor(softcap, device=device)  # a number would not compile where shapes are dynamic

    def score_mod(score: Tensor, _b: Tensor, _head: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


def _flex_attention() -> Callable[..., Any]:
    """FlexAttention with fused kernels: compiled with its layer, or else by itself."""
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention
    return _compiled_flex()


@cache
def _compiled_flex() -> Callable[..., Any]:
    """FlexAttention's fused kernels.

    They are compiled once for packs of all widths and all windows, with and without gradients, for each size of heads.
    Torch would compute all scores beyond its limit of variants.
    """
    from torch.nn.attention.flex_attention import flex_attention

    configure_compiler()
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def padding_mask(pack: Pack) -> Tensor:
    """[B, T], 1 for a token and 0 for padding: the usual attention mask of a padded batch."""
    return pack.is_token.long()


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
