"""LoRA within the product of its base layer, for bases in NF4.

y = x Wᵀ + s · (x Aᵀ) Bᵀ (Hu et al. 2021, Eq. 3) is one product of longer rows: [x, x Aᵀ] [W, s B]ᵀ. So nothing is read
and added again that is as large as y. In the backward pass, one product gives the gradients of both parts of the row.

NF4 is dequantised block by block, and each block is a part of a row of W. One block more in each row, of zeros, has the
place for s B. Layers that get the same x, such as those of queries, keys and values, share its longer rows: [x, x A₁ᵀ,
x A₂ᵀ, …]. Each has zeros in the columns of the others.

Where memory is free, the longer rows of W stay dequantised (`Groups.keep`). Their numbers are the same, so a run may
give them up at any time.

Shapes: n tokens, K inputs, N outputs, r the rank of a layer, P columns more.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from worker.trainer.errors import PeerLost
from worker.trainer.gradients import Views, segment_products, views_of
from worker.trainer.linears import body

BLOCK = 64
"""Weights that have a scale together."""
PROBED = 4
"""Tokens of the text that shows which layers get the same x."""
ZEROS = 0x77
"""Two zeros in NF4."""


@dataclass(frozen=True)
class Packed:
    """A weight in NF4, as its layer has it: the bits of its numbers, and their scales, which may have 8 bits again."""

    rows: int
    bits: Tensor
    scales: Tensor
    nested_scales: Tensor | None
    code: Tensor | None
    offset: Tensor | None

    @classmethod
    def of(cls, layer: Linear4bit) -> "Packed":
        """Those of `layer`. `data`, because a sharded base gathers into the same memory before the backward pass."""
        state: QuantState = layer.weight.quant_state
        inner = state.state2 if state.nested else None
        return cls(
            state.shape[0], layer.weight.data, state.absmax.data, None if inner is None else inner.absmax.data,
            None if inner is None else inner.code.data, state.offset.data if state.nested else None,
        )  # fmt: skip

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.bits, self.scales, self.nested_scales, self.code, self.offset


def is_extendable(layer: nn.Module) -> bool:
    """Whether the rows of a layer's weight can be longer: it is in NF4, and each of its blocks is a part of a row."""
    if not isinstance(layer, Linear4bit) or layer.in_features % BLOCK or layer.weight.dtype != torch.uint8:
        return False
    state = layer.weight.quant_state
    inner = state.state2 if state.nested else None
    return (state.blocksize, state.quant_type) == (BLOCK, "nf4") and (inner is None or inner.blocksize == 256)


def dequantised(packed: Packed, columns: int, dtype: torch.dtype) -> Tensor:
    """W with `columns` columns of zeros more, [N, K + columns]. `columns` is a multiple of `BLOCK`."""
    scales = packed.scales
    if packed.nested_scales is not None:
        assert packed.code is not None and packed.offset is not None
        scales = torch.ops.bitsandbytes.dequantize_blockwise(
            scales, packed.nested_scales, packed.code, 256, torch.float32
        )
        scales = scales + packed.offset
    bits = pad(packed.bits.reshape(packed.rows, -1), (0, columns // 2), value=ZEROS)
    scales = pad(scales.view(packed.rows, -1), (0, columns // BLOCK))
    shape = [packed.rows, 2 * bits.shape[1]]
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        bits.view(-1, 1), scales.flatten().float(), BLOCK, "nf4", shape, dtype
    )
    return weight


class Layer(Protocol):
    """A LoRA layer."""

    base_layer: Linear4bit
    views: Views | None
    group: "Group | None"

    def plain_weights(self) -> tuple[nn.Parameter, ...]:
        """A and B."""

    def scale(self) -> float:
        """The factor s of the adapter."""


class Groups:
    """All groups of a model.

    `on`: whether they are used. It holds from the begin of a forward pass to the end of its backward pass.
    """

    def __init__(self) -> None:
        self.all: list[Group] = []
        self.on = False

    def use(self, on: bool) -> None:
        """Begin a forward pass, with adapters within their products or beside them. Forget what another one left."""
        self.on = on
        for group in self.all:
            group.forget()

    @property
    def columns(self) -> list[int]:
        """P of each group. The bits of a product may depend on it."""
        return [group.columns for group in self.all]

    # -- dequantised weights that stay -------------------------------------------------------------------------------

    @property
    def dequantised_bytes(self) -> int:
        """Bytes of all dequantised weights, with their longer rows."""
        return sum(group.dequantised_bytes for group in self.all)

    def keep(self) -> None:
        """Keep the weights dequantised."""
        for group in self.all:
            group.keep()

    def release(self) -> bool:
        """Keep no dequantised weights any more. Returns whether there were any."""
        kept = any(group.kept for group in self.all)
        for group in self.all:
            group.kept = {}
        return kept

    @property
    def kept(self) -> list[Tensor]:
        """The dequantised weights that stay."""
        return [weight for group in self.all for weight in group.kept.values()]


class Group:
    """LoRA layers that get the same x, in the order of their calls."""

    def __init__(self, layers: Sequence[Layer], groups: Groups) -> None:
        self._layers, self._groups = layers, groups
        ranks = [len(layer.plain_weights()[0]) for layer in layers]
        self._starts = [sum(ranks[:number]) for number in range(len(layers))]
        self.columns = -(-sum(ranks) // BLOCK) * BLOCK
        """P, in whole blocks."""
        self.kept = dict[int, Tensor]()
        """The dequantised weights [N, K + P] that stay, by the number of their layer."""
        self._x: Tensor | None = None
        self._rows: Tensor | None = None

    @property
    def on(self) -> bool:
        """Whether the layers compute their adapters within their products now."""
        return self._groups.on

    def forget(self) -> None:
        """Forget the rows of a pass that did not reach the last layer."""
        self._x = self._rows = None

    @property
    def dequantised_bytes(self) -> int:
        """Bytes of its dequantised weights."""
        bases = [layer.base_layer for layer in self._layers]
        return sum(
            base.out_features * (base.in_features + self.columns) * base.compute_dtype.itemsize for base in bases
        )

    def keep(self) -> None:
        """Keep its weights dequantised, in the dtype of their products."""
        for number, layer in enumerate(self._layers):
            base = layer.base_layer
            self.kept[number] = dequantised(Packed.of(base), self.columns, base.compute_dtype)

    def output(self, layer: Layer, x: Tensor) -> Tensor:
        """The output of `layer` for `x` [..., K], with its adapter: [n, N]."""
        base, number = layer.base_layer, next(k for k, other in enumerate(self._layers) if other is layer)
        rows = self._rows
        if rows is None or self._x is not x:
            rows = self._extend(x.flatten(0, -2).to(base.compute_dtype))
        last = number == len(self._layers) - 1
        self._x, self._rows = (None, None) if last else (x, rows)
        (_, b), ends = views_of(layer, *layer.plain_weights())
        packed, start = Packed.of(base), base.in_features + self._starts[number]
        output: Tensor = _ExtendedProduct.apply(  # type: ignore[no-untyped-call]
            rows, b, ends, layer.scale(), start, self.columns, packed.rows, self.kept.get(number), *packed.tensors
        )
        return (output if base.bias is None else output + base.bias.to(output.dtype)).to(x.dtype)

    def _extend(self, x: Tensor) -> Tensor:
        """The longer rows [n, K + P] of `x` [n, K]."""
        views = [views_of(layer, *layer.plain_weights()) for layer in self._layers]
        matrices = [each.weights[0] for each in views]
        rows: Tensor = _Extended.apply(x, self.columns, views[0].ends, *matrices)  # type: ignore[no-untyped-call]
        return rows


@torch.no_grad()
def join(model: PreTrainedModel, layers: Iterable[Layer], share: float) -> Groups:
    """Let those `layers` of a causal `model` that can have longer rows compute with them, in groups with the same x.

    A pass over a short text shows which get the same x; none do if the model cannot compute it. `share`: the largest
    share of P in K. A group with a larger one would cost more than it saves.
    """
    groups = Groups()
    extendable = [layer for layer in layers if layer.plain_weights() and is_extendable(layer.base_layer)]
    if not extendable or not share:
        return groups
    calls = list[tuple[Layer, Tensor]]()
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: calls.append((module, args[0])))  # type: ignore[attr-defined]
        for layer in extendable
    ]
    try:
        body(model)(input_ids=torch.zeros(1, PROBED, dtype=torch.long, device=model.device), use_cache=False)
    except (torch.OutOfMemoryError, PeerLost):
        raise
    except Exception:  # the check before training reports what is wrong with the model
        return groups
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(id(layer) for layer, _ in calls)
    for _, same in groupby(calls, lambda call: id(call[1])):
        members = [layer for layer, _ in same]
        group = Group(members, groups)
        fits = group.columns <= share * members[0].base_layer.in_features
        if fits and all(times[id(layer)] == 1 for layer in members):
            groups.all.append(group)
            for layer in members:
                layer.group = group
    return groups


class _Extended(torch.autograd.Function):
    """[x, x A₁ᵀ, x A₂ᵀ, …, 0] of n rows with K + `columns` numbers, for x [n, K] and A [S, r, K] (see `Views`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: int, ends: Tensor | None, *all_a: Tensor) -> Tensor:
        a = torch.cat([each[0] for each in all_a]).to(x.dtype)  # (Σ r, K)
        ctx.save_for_backward(x, a, ends)
        ctx.ranks, ctx.dtype = [each.shape[1] for each in all_a], all_a[0].dtype
        return torch.cat([x, x @ a.t(), x.new_zeros((x.shape[0], columns - len(a)))], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, ends = ctx.saved_tensors
        inputs = x.shape[1]
        grad_low = grad[:, inputs : inputs + len(a)]  # (n, Σ r)
        grad_x = grad[:, :inputs] + grad_low @ a if ctx.needs_input_grad[0] else None  # the compiler fuses the sum
        grads = segment_products(grad_low, x, ends, ctx.dtype).split(ctx.ranks, 1)  # (S, r, K) each
        return grad_x, None, None, *grads


class _ExtendedProduct(torch.autograd.Function):
    """[x, …] [W, s B]ᵀ for longer rows `x` [n, K + P] and B [S, N, r], whose columns begin at `start`: [n, N]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, all_b: Tensor, ends: Tensor | None, scaling: float, start: int, columns: int, rows: int,
        *weight: Tensor | None,
    ) -> Tensor:  # fmt: skip
        b = all_b[0]
        low = x[:, start : start + b.shape[1]].clone()  # a view would keep all of x
        ctx.save_for_backward(low, b, ends, *weight)
        ctx.settings = scaling, start, columns, rows
        output: Tensor = times_longer(x, b, scaling, start, columns, rows, *weight, transposed=True)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, b, ends, *weight = ctx.saved_tensors
        grad_x = times_longer(grad, b, *ctx.settings, *weight, transposed=False)  # (n, K + P)
        grad_b = segment_products(grad, low * ctx.settings[0], ends, b.dtype)  # (S, N, r)
        return grad_x, grad_b, *(None,) * (5 + len(weight))


@torch.library.custom_op("dpo::times_longer", mutates_args=())
def times_longer(
    left: Tensor,
    b: Tensor,
    scaling: float,
    start: int,
    columns: int,
    rows: int,
    kept: Tensor | None,
    bits: Tensor,
    scales: Tensor,
    nested_scales: Tensor | None,
    code: Tensor | None,
    offset: Tensor | None,
    *,
    transposed: bool,
) -> Tensor:
    """left · [W, s B] for `left` [n, N], or left · [W, s B]ᵀ for `left` [n, K + P].

    s B [N, r] is in the columns from `start` on. W is a `Packed`, which `kept` [N, K + P] may have dequantised. An
    operator of its own, because the compiler would find the same matrix in both passes, and keep it for the second one.
    """
    if kept is None:
        weight = dequantised(Packed(rows, bits, scales, nested_scales, code, offset), columns, left.dtype)
    else:
        weight = kept.data  # nobody else reads these columns, so for autograd it does not change
    weight[:, start : start + b.shape[1]] = b * scaling
    return left @ (weight.t() if transposed else weight)


@times_longer.register_fake
def _(
    left: Tensor,
    b: Tensor,
    scaling: float,
    start: int,
    columns: int,
    rows: int,
    kept: Tensor | None,
    bits: Tensor,
    *_: Tensor | None,
    transposed: bool,
) -> Tensor:
    # `len` would compile for this number of tokens alone.
    return left.new_empty((left.shape[0], rows if transposed else 2 * bits.numel() // rows + columns))
