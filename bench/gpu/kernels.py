"""Single kernels on the card: attention over packs, and the bits of products."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from app.spec.json_types import JsonObject
from bench.gpu import shapes
from bench.gpu.shapes import DEVICE, seconds_of, synchronize
from worker.trainer.attention import tree_attention
from worker.trainer.data import Response, Row
from worker.trainer.packing import Pack, Packing


def random_row(number: int, prompt: int, response: int, vocabulary: int = 1000) -> Row:
    """A pair of random tokens: `prompt` and `response` are lengths. Its `number` is the seed."""
    generator = torch.Generator().manual_seed(number)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, vocabulary, (length,), generator=generator).tolist())

    return Row(number, ids(prompt), tuple(Response(ids(response), (True,) * response) for _ in range(2)))


def _pack(tokens: int) -> Pack:
    """A pack of about `tokens` tokens with several segments."""
    rows = [random_row(number, 100 + 17 * (number % 16), 60 + 5 * (number % 16)) for number in range(tokens // 200)]
    packing = Packing(tokens, windows=(None,), segment_tokens=tokens // 4)
    return next(packing.packs(rows, range(len(rows))))


def attention() -> Iterator[JsonObject]:
    """FlexAttention over packs: its error and seconds, those of compilation, and whether its bits are the same."""
    heads, groups, width = (4, 2, 16) if shapes.dry else (32, 8, 128)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def inputs(pack: Pack) -> list[Tensor]:
        shape = (1, heads, pack.slots, width)
        tensors = [
            torch.randn(shape if k == 0 else (1, groups, *shape[2:]), generator=generator, device=DEVICE)
            for k in range(3)
        ]
        return [tensor.to(torch.bfloat16).requires_grad_(DEVICE.type == "cuda") for tensor in tensors]

    def run(pack: Pack, tensors: list[Tensor]) -> list[Tensor]:
        query, key, value = tensors
        output, _ = tree_attention(torch.nn.Module(), query, key, value, tree=pack.mask)
        if DEVICE.type != "cuda":  # no backward pass there
            return [output.detach()]
        gradients = torch.autograd.grad(output, tensors, torch.ones_like(output))
        return [output.detach(), *gradients]

    packs = [_pack(tokens).to(DEVICE) for tokens in ((512, 1024) if shapes.dry else (1024, 2048, 8192))]
    for pack in packs:
        tensors = inputs(pack)
        began = time.perf_counter()
        run(pack, tensors)
        synchronize()
        yield {f"first_seconds_at_{pack.slots}": time.perf_counter() - began}
    blocks, tensors = packs[-1].mask.blocks[None], inputs(packs[-1])
    yield {
        "blocks_computed": blocks.computed,
        "blocks_of_a_causal_mask": len(blocks.kv_num_blocks[0, 0]) * (len(blocks.kv_num_blocks[0, 0]) + 1) // 2,
        "seconds": seconds_of(lambda: run(packs[-1], tensors)),
    }
    if DEVICE.type == "cuda":
        few = packs[0]
        few.mask.errors = []
        run(few, inputs(few))
        yield {"relative_error": few.mask.errors[0]}
    outcomes = [run(packs[-1], tensors) for _ in range(2 if shapes.dry else 10)]
    yield {"bits_repeat": all(all(map(torch.equal, outcomes[0], outcome)) for outcome in outcomes)}


def products() -> Iterator[JsonObject]:
    """Whether a row of a product has the same bits among 1,024, 2,048, 4,096 and 8,192 rows."""
    sizes = (64, 128) if shapes.dry else (1024, 2048, 4096, 8192)
    shape = [(64, 32)] if shapes.dry else [(4096, 4096), (1024, 4096), (14_336, 4096), (4096, 14_336)]
    allowed = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    for reduced in (True, False):
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
        for rows, columns in shape:
            weight = torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
            x = torch.randn(sizes[-1], columns, device=DEVICE, dtype=torch.bfloat16)
            whole = x @ weight.T
            equal = [size for size in sizes[:-1] if torch.equal(x[:size] @ weight.T, whole[:size])]
            name = f"rows_alike_{rows}x{columns}" + ("" if reduced else "_full_precision_reduction")
            yield {name: equal}
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = allowed
