"""The least time of a training step on an H100, by arithmetic: what each part computes, and what it moves.

The step trains an adapter of rank 16 on the shape of Llama 3.1 8B in NF4. It has one pack of 8,192 tokens, and half of
them are scored. Nothing here is measured.
"""

from dataclasses import dataclass

TOKENS, SCORED, RANK = 8192, 4096, 16
LAYERS, HIDDEN, WIDE, VOCABULARY, KEYS = 32, 4096, 14_336, 128_256, 1024
"""`WIDE`: the width of the feed-forward part. `KEYS`: the width of all keys, and that of all values."""
VISIBLE_KEYS = 256
"""Keys that the attention kernel computes for a query: two blocks, for the lengths of HH."""
PEAK_FLOPS, PEAK_BYTES = 989e12, 3.35e12
"""By the data sheet of an H100 SXM: dense bfloat16 FLOP/s, and bytes a second."""
REACHED_FLOPS, REACHED_BYTES = 670e12, 2.5e12
"""The expected rates of a layer's products and of elementwise kernels: 85 % of 790 TFLOP/s, and 75 % of the peak."""
REACHED_IN_FP8 = 1100e12
"""The expected rate of a layer's products in FP8, with a scale for each row: 56 % of the data sheet's 1,979 TFLOP/s."""
ATTENTION_FLOPS = 200e12
"""The expected rate of FlexAttention, forward and backward."""
IDLE_SECONDS, IDLE_COMPILED_SECONDS = 0.05, 0.01
"""How long the device is expected to wait for Python in a step, without and with compiled layers."""
_LINEARS = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, KEYS)] * 2 + [(HIDDEN, WIDE)] * 2 + [(WIDE, HIDDEN)]
"""(inputs, outputs) of the linear layers of a layer: q, o; k, v; gate, up; down."""
WEIGHTS = LAYERS * sum(inputs * outputs for inputs, outputs in _LINEARS)
ADAPTER = LAYERS * RANK * sum(inputs + outputs for inputs, outputs in _LINEARS)


@dataclass(frozen=True)
class Work:
    """A part of a step: its FLOPs, the bytes that it moves, and those that it must move.

    `compiled_bytes` are those that it moves with compiled layers, if they are others. `rate` is the FLOP/s that its
    kernels are expected to reach.
    """

    name: str
    flops: float = 0.0
    bytes: float = 0.0
    least_bytes: float = 0.0
    compiled_bytes: float | None = None
    rate: float = REACHED_FLOPS
    seconds_in_fp8: float | None = None
    """Seconds with compiled layers whose base computes in FP8, if they are others than `compiled`."""

    @property
    def floor(self) -> float:
        """Seconds at the peaks of the data sheet."""
        return max(self.flops / PEAK_FLOPS, self.least_bytes / PEAK_BYTES)

    @property
    def predicted(self) -> float:
        """Seconds with uncompiled layers, at the rates that are expected."""
        return max(self.flops / self.rate, self.bytes / REACHED_BYTES)

    @property
    def compiled(self) -> float:
        """Seconds with compiled layers, at the rates that are expected."""
        moved = self.bytes if self.compiled_bytes is None else self.compiled_bytes
        return max(self.flops / self.rate, moved / REACHED_BYTES)

    @property
    def in_fp8(self) -> float:
        """Seconds with compiled layers whose base computes in FP8, at the rates that are expected."""
        return self.compiled if self.seconds_in_fp8 is None else self.seconds_in_fp8

    @property
    def within_reach(self) -> float:
        """Seconds at these rates, if it moves only what it must."""
        return max(self.flops / self.rate, self.least_bytes / REACHED_BYTES)


def _by_layer(forward: float) -> float:
    """Bytes of a step, for those of a token and layer in the forward pass. The backward pass moves twice as many."""
    return 3 * forward * TOKENS * LAYERS


NORMS, FUSED_NORMS = 2 * 36 * HIDDEN, 2 * 4 * HIDDEN
"""Two norms. Eager: to float32 (6 bytes a number), square (8), mean (4), scale (8), to 16 bits (6), weight (4)."""
RESIDUALS, FUSED_RESIDUALS = 2 * 6 * HIDDEN, 2 * 4 * HIDDEN
"""Two additions. In one kernel with the norm that follows, the sum is read only once."""
ROTARY, FUSED_ROTARY = 20 * (HIDDEN + KEYS), 4 * (HIDDEN + KEYS)
"""Rotary embeddings of queries and keys: two products, a rotation, and a sum."""
SWIGLU, FUSED_SWIGLU = 10 * WIDE, 6 * WIDE
"""silu(gate), and its product with up."""
AGAIN = 2 * 2 * (2 * HIDDEN + WIDE)
"""The results of two norms and of SwiGLU, which a compiled backward pass writes again for the products, and reads."""
ROUNDING = 3 * sum(inputs + outputs for inputs, outputs in _LINEARS)
"""In FP8, the inputs of products and the gradients of their outputs are read in 16 bits and written in 8."""
LORA = sum(2 * inputs + 4 * outputs for inputs, outputs in _LINEARS)
"""Beside a product: x is read again, and the output is read and written again."""
COLUMNS = 64
"""Within a product: columns that it has more, in whole blocks of NF4."""
SHARED, OUTPUTS = 3 * HIDDEN + WIDE, sum(outputs for _, outputs in _LINEARS)
"""`SHARED`: the widths of different inputs, those of q, k and v counted once, as well as those of gate and up."""
LORA_WITHIN = 6 * SHARED + 10 * SHARED + 2 * OUTPUTS
"""x is read for A and copied into longer rows. The gradients of rows are added and copied; x is read for A's gradient,
and the gradient of outputs for B's."""
LORA_WITHIN_COMPILED = LORA_WITHIN - 4 * SHARED
"""The sum of the two gradients of x is fused with what follows."""
LONGER_WEIGHTS = 2 * (1 + 20 / 64) * WEIGHTS
"""In both passes the bits of W are copied into longer rows, and so are the scales of its blocks, in float32."""

PARTS = (
    Work(
        "products of the layers", 4.0 * (WEIGHTS + LAYERS * COLUMNS * OUTPUTS) * TOKENS, 4.0 * WEIGHTS, 4.0 * WEIGHTS,
        seconds_in_fp8=4.0 * WEIGHTS * TOKENS / REACHED_IN_FP8,
    ),
    Work(
        "dequantisation, or rounding to FP8", 0.0, 2 * 2.5 * WEIGHTS, 2 * 2.5 * WEIGHTS,
        seconds_in_fp8=(ROUNDING * TOKENS * LAYERS + 2 * WEIGHTS) / REACHED_BYTES,  # the backward pass transposes W
    ),
    Work(
        "head", 4.0 * VOCABULARY * HIDDEN * SCORED,
        32.0 * VOCABULARY * SCORED, 8.0 * VOCABULARY * SCORED,
    ),
    Work("attention", 14.0 * TOKENS * VISIBLE_KEYS * HIDDEN * LAYERS, rate=ATTENTION_FLOPS),
    Work(
        "LoRA", 6.0 * ADAPTER * TOKENS,
        LORA_WITHIN * TOKENS * LAYERS + LONGER_WEIGHTS, 0.0,
        compiled_bytes=LORA_WITHIN_COMPILED * TOKENS * LAYERS + LONGER_WEIGHTS,
        seconds_in_fp8=_by_layer(LORA) / REACHED_BYTES,  # beside the products
    ),
    Work(
        "norms, residuals, rotary, SwiGLU", 0.0,
        _by_layer(NORMS + RESIDUALS + ROTARY + SWIGLU),
        _by_layer(FUSED_NORMS + FUSED_RESIDUALS + FUSED_ROTARY + FUSED_SWIGLU),
        compiled_bytes=_by_layer(FUSED_NORMS + FUSED_RESIDUALS + FUSED_ROTARY + FUSED_SWIGLU)
        + AGAIN * TOKENS * LAYERS,
    ),
)  # fmt: skip
