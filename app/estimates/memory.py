"""What a training needs of a device's memory, from the model's shape and the job's settings alone.

The engine packs rows into at most `BUDGET` tokens, keeps what the backward pass needs of each layer, or only each
layer's input where all of it would not fit, and never holds more than a chunk of logits. `bench/memory.py` holds this
model against measured peaks; docs/engine.md has the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.spec.hyperparameters import Hyperparameters
from app.spec.job import Adapter, JobSpec

BUDGET = {"cpu": 2048, "cuda": 8192}
"""Tokens of a pack, as worker/trainer/model.py has them."""


@dataclass(frozen=True)
class Coefficients:
    """What a device kind adds to what can be counted. Numbers a token, in units of a layer's sizes."""

    runtime: int
    """Bytes of the libraries: on a CPU the process, on a GPU the CUDA context and cuBLAS."""
    hidden: float
    outputs: float
    """A layer keeps `hidden` times its width and `outputs` times the outputs of its linear layers."""
    recomputed: float
    """A layer that is recomputed keeps so many times its width."""
    temporary: float
    """The backward pass of one layer holds so many times the outputs of its linear layers."""
    dequantised: float
    """Copies of the quantised weights, in what is computed with, that exist at a time."""


CPU = Coefficients(520_000_000, 1.5, 2.7, 10.5, 4.2, 1.26)
"""Fitted to the largest resident sets of whole runs (bench/memory.py): the allocator's waste is in them."""
CUDA = Coefficients(700_000_000, 0.0, 1.9, 1.0, 2.0, 0.0)
"""Counted from the tensors that autograd keeps; not measured on a GPU yet."""
UNADAPTED = 0.7
"""What a linear layer without an adapter keeps of what one with an adapter does: its input is not needed."""
LOGITS = 1 << 26
"""Logits that exist at a time on a GPU, as worker/trainer/logps.py has them; a CPU's are few."""
RESERVE = 0.8
"""The share of the free memory that activations may fill before they are recomputed."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight: four bits, its block's scale in a byte, and that one's in a float (Dettmers et al. 2023)."""
NF4_PLAIN = 0.5 + 4 / 64
"""The same with each block's scale in a float."""
OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "rmsprop": 4}
"""Moments of a trained parameter."""


@dataclass(frozen=True)
class Linear:
    """`count` linear layers of one name and size."""

    name: str
    outputs: int
    inputs: int
    count: int

    @property
    def parameters(self) -> int:
        return self.outputs * self.inputs * self.count


@dataclass(frozen=True)
class Shape:
    """A model by its sizes. `others` counts the parameters that are not in linear layers: embeddings, head, norms."""

    hidden: int
    layers: int
    vocabulary: int
    context: int
    linears: tuple[Linear, ...]
    others: int
    tied: bool = False
    """Whether embeddings and head are one tensor."""

    @classmethod
    def of(cls, details: dict[str, Any]) -> "Shape | None":
        """The shape that a worker registered; None where it could not tell."""
        shape = details.get("shape")
        if not isinstance(shape, dict):
            return None
        linears = tuple(Linear(*entry) for entry in shape["linears"])
        known = {"context": details.get("context_length") or 2048, "tied": bool(details.get("tied"))}
        return cls(**shape | {"linears": linears} | known)

    @property
    def parameters(self) -> int:
        return sum(linear.parameters for linear in self.linears) + self.others

    def adapted(self, targets: str | Sequence[str]) -> list[Linear]:
        """The linear layers that an adapter on `targets` sits on."""
        return [linear for linear in self.linears if targets == "all-linear" or linear.name in targets]


@dataclass(frozen=True)
class MemorySettings:
    """What of a job its memory depends on. `rank` None: all parameters are trained."""

    rank: int | None
    targets: str | Sequence[str]
    quantization: str
    optimizer: str
    recompute: bool | None
    batch_tokens: float
    """Tokens of a batch, prompts that are shared counted once."""
    longest_row: int
    saved: int = 0
    """Embeddings and heads that are trained whole beside an adapter."""
    double: bool = True
    """Whether the scales of `nf4` are quantised too."""

    @classmethod
    def of(cls, spec: JobSpec, stage: Hyperparameters, tokens_per_row: float, longest_row: int) -> "MemorySettings":
        """Those of a stage with the hyperparameters `stage`, of a resolved job."""
        adapter = spec.adapter if isinstance(spec.adapter, Adapter) else None
        return cls(
            rank=None if adapter is None else adapter.r,
            targets="all-linear" if adapter is None else adapter.target_modules,
            quantization=spec.quantization or "none",
            optimizer=stage.optimizer,
            recompute=stage.activation_checkpointing,
            batch_tokens=tokens_per_row * (stage.batch_size or 16),
            longest_row=longest_row,
            double=spec.double_quantization is not False,
            saved=0 if adapter is None else len(adapter.modules_to_save or []),
        )


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by what they are for."""

    runtime: int
    model: int
    adapter: int
    optimizer: int
    activations: int
    temporary: int
    recompute: bool

    @property
    def total(self) -> int:
        return self.runtime + self.model + self.adapter + self.optimizer + self.activations + self.temporary


def estimate(shape: Shape, settings: MemorySettings, device: str, available: int | None) -> Memory:
    """The peak on a `device` (cpu or cuda) with `available` bytes; None: as much as it takes."""
    full = settings.rank is None
    width = 2 if device == "cuda" and not full else 4
    """Bytes of a number that is computed with."""
    known = CUDA if device == "cuda" else CPU
    model, temporary = _weights(shape, settings, width, known)
    adapted = shape.adapted(settings.targets)
    in_adapter = sum(one.count * (settings.rank or 0) * (one.outputs + one.inputs) for one in adapted)
    in_adapter += min(settings.saved, 1 if shape.tied else 2) * shape.vocabulary * shape.hidden
    trained = shape.parameters if full else in_adapter
    adapter = 0 if full else 4 * trained
    # The gradient, the moments, and of an adapter a copy of the last good weights.
    optimizer = trained * (4 + OPTIMIZER_BYTES[settings.optimizer] + (0 if full else 4))
    tokens = max(settings.longest_row, min(BUDGET[device], settings.batch_tokens))
    if device == "cuda":  # packs have a few fixed widths
        step = BUDGET[device] // 8
        tokens = -(-int(tokens) // step) * step
        temporary += 2 * 4 * LOGITS
    outputs = _outputs(shape, settings, full)
    kept = int(tokens * width * shape.layers * (known.hidden * shape.hidden + known.outputs * outputs))
    temporary += int(tokens * width * known.temporary * outputs)
    recompute = settings.recompute
    if recompute is None:
        fixed = known.runtime + model + adapter + optimizer
        recompute = available is not None and kept > RESERVE * (available - fixed)
    if recompute:
        kept = int(tokens * width * shape.layers * known.recomputed * shape.hidden)
        temporary += int(tokens * width * known.outputs * outputs) if device == "cuda" else 0
    return Memory(known.runtime, model, adapter, optimizer, kept, temporary, recompute)


def _weights(shape: Shape, settings: MemorySettings, width: int, known: Coefficients) -> tuple[int, int]:
    """(bytes of the weights, bytes of what is dequantised of them at a time)."""
    inside = sum(linear.parameters for linear in shape.linears)
    others = shape.others * width
    if settings.quantization == "none":
        return inside * width + others, 0
    largest = max((linear.outputs * linear.inputs for linear in shape.linears), default=0)
    each = (NF4_BYTES if settings.double else NF4_PLAIN) if settings.quantization == "nf4" else 1.0
    return int(inside * each) + others, max(largest * width, int(known.dequantised * inside * width))


def _outputs(shape: Shape, settings: MemorySettings, full: bool) -> float:
    """The outputs of a layer's linear layers, those without an adapter counted less."""
    adapted = {linear.name for linear in shape.adapted("all-linear" if full else settings.targets)}
    return sum(
        linear.outputs * linear.count / shape.layers * (1.0 if linear.name in adapted else UNADAPTED)
        for linear in shape.linears
    )
