"""The page that says which models fit on which GPU, from the memory model of estimates."""

from app.estimates.memory import BUDGET, Linear, MemorySettings, Shape, estimate
from docs.generate.figures import result
from docs.generate.markdown import table

GIGABYTE = 1e9
USABLE = 0.95
"""The share of a GPU's memory that a job may take."""
ROW_TOKENS, BATCH = 1024, 16
GPUS = {16: "T4, RTX 4080", 24: "RTX 4090, A10, L4", 48: "A40, L40S", 80: "A100, H100", 141: "H200"}
"""The memory of usual GPUs in GB."""


def accuracy() -> float:
    """The largest error of the memory model in the runs of `bench.memory` on a CPU."""
    return max(abs(1 - float(spec["ratio"])) for spec in result("memory")["specs"])


INTRODUCTION = f"""# Which model fits on which GPU

Generated from the memory model of estimates (`app/estimates/memory.py`). The job is DPO with rows of {ROW_TOKENS:,}
tokens in batches of {BATCH}, and a LoRA adapter of rank 16 on all linear layers.
`dpo jobs create … --estimate` does it for your model, your file and your settings. It also says whether the job fits on
a worker that you have.

**These numbers are not measured.** On a CPU, the model is within {accuracy():.0%} of measured peaks
([engine](../engine.md#memory-expected-and-measured)). On a GPU it was not compared yet.

A cell is the memory at the peak in GB. If all activations fit, they are kept. Otherwise they are recomputed in the
backward pass, which needs the second number and takes longer. The service chooses by the memory of the device.
"""
END = f"""
| memory of a GPU | such as |
|---|---|
{"".join(f"| {size} GB | {names} |{chr(10)}" for size, names in GPUS.items())}
- **Longer rows** need more: activations grow with `max_length` where a row is longer than a pack.
- **`batch_size` costs nothing** above {BUDGET["cuda"]:,} tokens a batch: it is computed in packs of that size.
- **All parameters** (`"adapter": "none"`) need gradients and moments of every weight, in float32.
- **The smallest GPU** recomputes activations, and {1 - USABLE:.0%} of its memory stay free.
- **A job uses the fewest GPUs of a worker on which it fits**, or as many as `resources.gpus` says. Several GPUs divide
  a model that would take more than half of one. See
  [several devices](../how-to/train-on-several-devices.md#models-that-do-not-fit-on-one-device).

The memory of each GPU in GB, if several divide the model and recompute activations. The divided figures are on paper:

"""


def llama_like(hidden: int, layers: int, heads: int, pairs: int, feed: int, vocabulary: int, *, tied: bool) -> Shape:
    """The shape of a model with gated feed-forward layers and grouped attention. Heads have 128 numbers, or 64."""
    head = 64 if hidden // heads == 64 else 128
    sizes = {
        "q_proj": (heads * head, hidden), "k_proj": (pairs * head, hidden), "v_proj": (pairs * head, hidden),
        "o_proj": (hidden, heads * head), "gate_proj": (feed, hidden), "up_proj": (feed, hidden),
        "down_proj": (hidden, feed),
    }  # fmt: skip
    linears = tuple(Linear(name, outputs, inputs, layers) for name, (outputs, inputs) in sizes.items())
    others = vocabulary * hidden * (1 if tied else 2) + hidden * (2 * layers + 1)
    return Shape(hidden, layers, vocabulary, 131_072, linears, others, tied)


MODELS = {
    "Llama 3.2 1B": llama_like(2048, 16, 32, 8, 8192, 128_256, tied=True),
    "Llama 3.2 3B": llama_like(3072, 28, 24, 8, 8192, 128_256, tied=True),
    "Qwen2.5 7B": llama_like(3584, 28, 28, 4, 18_944, 152_064, tied=False),
    "Llama 3.1 8B": llama_like(4096, 32, 32, 8, 14_336, 128_256, tied=False),
    "Qwen2.5 14B": llama_like(5120, 48, 40, 8, 13_824, 152_064, tied=False),
    "Qwen2.5 32B": llama_like(5120, 64, 40, 8, 27_648, 152_064, tied=False),
    "Llama 3.1 70B": llama_like(8192, 80, 64, 8, 28_672, 128_256, tied=False),
}
"""The sizes that the models' own configurations give."""
COUNTS = (1, 2, 4, 8)
"""Numbers of GPUs that divide a model."""
SETTINGS = {"nf4": ("nf4", 16), "int8": ("int8", 16), "none (bf16)": ("none", 16), "all parameters": ("none", None)}


def needed(shape: Shape, quantization: str, rank: int | None, *, recompute: bool, devices: int = 1) -> float:
    """The memory at the peak on each of some GPUs that divide the model, in GB."""
    settings = MemorySettings(
        rank=rank, targets="all-linear", quantization=quantization, optimizer="adamw", recompute=recompute,
        batch_tokens=ROW_TOKENS * BATCH, longest_row=ROW_TOKENS, devices=devices, shard=True,
    )  # fmt: skip
    return estimate(shape, settings, "cuda", None).total / GIGABYTE


def page() -> str:
    """The memory of each model with each setting, and the smallest GPU for it."""
    rows = []
    for name, shape in MODELS.items():
        cells = []
        for quantization, rank in SETTINGS.values():
            kept, recomputed = (needed(shape, quantization, rank, recompute=choice) for choice in (False, True))
            cells.append(f"{kept:.0f}, or {recomputed:.0f}")
        smallest = next((size for size in GPUS if needed(shape, "nf4", 16, recompute=True) < USABLE * size), None)
        rows.append((name, f"{shape.parameters / 1e9:.1f}", *cells, "none" if smallest is None else f"{smallest} GB"))
    head = ("model", "10⁹ parameters", *SETTINGS, "smallest GPU for nf4")
    return "\n".join([INTRODUCTION, table(head, rows, range(1, len(head)))]) + END + _divided() + "\n"


def _divided() -> str:
    """The memory of each GPU by the number of GPUs that divide a model."""
    rows = [
        (
            f"{name}, {title}",
            *(f"{needed(MODELS[name], *SETTINGS[title], recompute=True, devices=count):.0f}" for count in COUNTS),
        )
        for name, title in (
            ("Llama 3.1 8B", "all parameters"),
            ("Qwen2.5 32B", "none (bf16)"),
            ("Llama 3.1 70B", "nf4"),
            ("Llama 3.1 70B", "none (bf16)"),
        )
    ]
    return table(("model", *(f"{count} GPU{'s' if count > 1 else ''}" for count in COUNTS)), rows, range(1, 5))
