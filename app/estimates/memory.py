"""Estimate the peak memory of a training from the model's shape and the job's settings.

The engine packs rows into at most `BUDGET` tokens. It keeps the activations of each layer for the backward pass, or
only each layer's input if all activations would not fit. It never holds more than a chunk of logits. `bench/memory.py`
compares this model with measured peaks, and docs/engine.md reports the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from app.spec.hyperparameters import MOMENT_BYTES, Hyperparameters, ReinforcementHyperparameters
from app.spec.job import Adapter, JobSpec
from app.spec.json_types import JsonObject
from app.spec.resources import SHARDED_FROM

BUDGET = {"cpu": 2048, "cuda": 8192}
"""Maximum tokens of a pack, the same as in worker/trainer/hardware.py."""
SEGMENT_TOKENS = 1024
"""Tokens of a segment, as in worker/trainer/packing.py."""
TREE_TOKENS = 4096
"""Maximum tokens of a prompt and its answers that are computed together, as in worker/trainer/packing.py."""
SAMPLED_TOKENS = {"cpu": 16_384, "cuda": 131_072}
"""Maximum tokens of answers that are written together, with their prompts, as in worker/trainer/hardware.py."""
SAMPLED_ANSWERS = {"cpu": 32, "cuda": 64}
"""Maximum number of answers that a training writes together, as in worker/trainer/hardware.py."""
SAMPLED_LOGIT = 28
"""Bytes of a logit of the next token while it is drawn: float32, and three times float64."""
WIDTH_STEP = 1024
"""The widths of packs on a GPU are multiples of it, as in worker/trainer/packing.py."""


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of one kind of device. All but `runtime` count numbers in units of a layer's sizes."""

    runtime: int
    """Fixed bytes: the process on a CPU, the CUDA context and cuBLAS on a GPU."""
    hidden: float
    """Per token, a layer keeps this many times its hidden width for the backward pass."""
    outputs: float
    """Per token, a layer also keeps this many times the outputs of its linear layers."""
    compiled: float
    """The same for a compiled layer, which computes the results of norms and activations again."""
    recomputed: float
    """Per token, a layer that is recomputed keeps only this many times its hidden width."""
    temporary: float
    """Per token, the backward pass of one layer holds this many times the outputs of its linear layers."""
    dequantised: float
    """Dequantised copies of all quantised weights that exist at a time, in the compute dtype."""


CPU = Coefficients(520_000_000, 1.5, 2.7, 2.7, 10.5, 4.2, 1.26)
"""Fitted to the peak resident set sizes of whole runs (bench/memory.py), which include the allocator's overhead."""
CUDA = Coefficients(700_000_000, 0.0, 2.21, 1.15, 1.0, 2.0, 0.0)
"""Counted from the tensors that autograd keeps (bench/activations.py). Not measured on a GPU yet."""
UNADAPTED = 0.7
"""Activations of a linear layer without an adapter, relative to one with an adapter: its input is not kept."""
LOGITS = 1 << 27
"""Logits that exist at a time on a GPU, as in worker/trainer/hardware.py. On a CPU they are too few to count."""
RESERVE = 0.8
"""Share of the free memory that activations may fill. If they need more, they are recomputed."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight: four bits, one byte per block of 64, and one float per 256 blocks (Dettmers et al. 2023)."""
NF4_PLAIN = 0.5 + 4 / 64
"""Bytes per weight without double quantisation: four bits, and one float per block of 64."""


@dataclass(frozen=True)
class Linear:
    """`count` linear layers with the same name and size."""

    name: str
    outputs: int
    inputs: int
    count: int

    @property
    def parameters(self) -> int:
        return self.outputs * self.inputs * self.count


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. `others` counts the parameters outside linear layers: embeddings, head, norms."""

    hidden: int
    layers: int
    vocabulary: int
    context: int
    linears: tuple[Linear, ...]
    others: int
    tied: bool = False
    """Whether embeddings and head share one tensor."""
    cached: int = 0
    """Keys and values of a token in the cache of a sampler, all layers together. 0 if not known."""
    graders: int = 0
    """Parameters of the reward models that are in memory beside it. They are not quantised."""

    @classmethod
    def of(cls, details: JsonObject) -> "Shape | None":
        """The shape in the details of a registered model; None if the worker could not determine it."""
        shape = details.get("shape")
        if not isinstance(shape, dict):
            return None
        linears = tuple(Linear(*entry) for entry in shape["linears"])
        sizes = {"context": details.get("context_length") or 2048, "tied": bool(details.get("tied"))}
        return cls(**shape | {"linears": linears} | sizes)

    @property
    def parameters(self) -> int:
        return sum(linear.parameters for linear in self.linears) + self.others

    def adapted(self, targets: str | Sequence[str]) -> list[Linear]:
        """The linear layers that an adapter with these `targets` adapts."""
        return [linear for linear in self.linears if targets == "all-linear" or linear.name in targets]


@dataclass(frozen=True)
class MemorySettings:
    """The settings of a stage on which its memory depends. `rank` None: all parameters are trained."""

    rank: int | None
    targets: str | Sequence[str]
    quantization: str
    optimizer: str
    recompute: bool | None
    batch_tokens: float
    """Tokens of a batch. A prompt that several answers share counts once."""
    longest_row: int
    saved_modules: int = 0
    """Number of embeddings and heads that are trained in full beside an adapter."""
    double_quantization: bool = True
    """Whether the scales of `nf4` are quantised too."""
    compiled: bool = False
    """Whether layers are compiled. Where the engine chooses, the estimate is on the safe side."""
    devices: int = 1
    """The devices of the training. Each holds the whole model unless it is divided."""
    shard: bool | None = False
    """Whether several devices divide the model; None: only if it would fill half of one."""
    answers: int = 0
    """Number of answers of a batch that the model writes itself."""

    @classmethod
    def of(cls, spec: JobSpec, stage: Hyperparameters, tokens_per_row: float, longest_row: int) -> "MemorySettings":
        """The settings of a stage of the resolved job `spec`. `stage` has the stage's hyperparameters."""
        adapter = spec.adapter if isinstance(spec.adapter, Adapter) else None
        return cls(
            rank=None if adapter is None else adapter.r,
            targets="all-linear" if adapter is None else adapter.target_modules,
            quantization=spec.weights,
            optimizer=stage.optimizer,
            recompute=stage.activation_checkpointing,
            batch_tokens=tokens_per_row * (stage.batch_size or 16),
            longest_row=longest_row,
            double_quantization=spec.double_quantization is not False,
            saved_modules=0 if adapter is None else len(adapter.modules_to_save or []),
            compiled=bool(stage.compile),
            devices=spec.resources.least,
            shard=False if spec.why_not_sharded() is not None else spec.parallel.shard,
            answers=stage.answers * (stage.batch_size or 16) if isinstance(stage, ReinforcementHyperparameters) else 0,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by purpose. `recompute`: whether activations are recomputed in the backward pass.

    `rollouts` are there while answers are written, and `activations` and `temporary` while the model learns from them.
    """

    runtime: int
    model: int
    graders: int
    adapter: int
    optimizer: int
    activations: int
    temporary: int
    rollouts: int
    recompute: bool

    @property
    def total(self) -> int:
        always = self.runtime + self.model + self.graders + self.adapter + self.optimizer
        return always + max(self.activations + self.temporary, self.rollouts)


def estimate(shape: Shape, settings: MemorySettings, device: str, available: int | None) -> Memory:
    """The peak memory on `device` (cpu or cuda). `available` is its memory in bytes; None means unlimited."""
    full = settings.rank is None
    width = 2 if device == "cuda" and not full else 4
    """Bytes of a number in the compute dtype."""
    factors = CUDA if device == "cuda" else CPU
    model, temporary = _weights(shape, settings, width, factors)
    adapted = shape.adapted(settings.targets)
    in_adapter = sum(linear.count * (settings.rank or 0) * (linear.outputs + linear.inputs) for linear in adapted)
    in_adapter += min(settings.saved_modules, 1 if shape.tied else 2) * shape.vocabulary * shape.hidden
    trained = shape.parameters if full else in_adapter
    adapter = 0 if full else 4 * trained
    weights = model + (trained * (4 + MOMENT_BYTES[settings.optimizer]) if full else 0)
    divided = settings.devices > 1 and (
        settings.shard or (settings.shard is None and (available is None or weights > SHARDED_FROM * available))
    )
    optimizer = _optimizer(settings, trained, divided=divided and full)
    if divided:
        model = _divided(shape, settings, model, width)
    graders = shape.graders * (2 if device == "cuda" else 4) if settings.answers else 0
    tokens = max(settings.longest_row, min(BUDGET[device], settings.batch_tokens))
    if device == "cuda":
        tokens = -(-int(tokens) // WIDTH_STEP) * WIDTH_STEP
        temporary += 2 * 4 * LOGITS  # two float32 tensors of one chunk of logits
    outputs = _outputs(shape, settings, full)
    kept = factors.compiled if settings.compiled else factors.outputs
    activations = int(tokens * width * shape.layers * (factors.hidden * shape.hidden + kept * outputs))
    temporary += int(tokens * width * factors.temporary * outputs)
    recompute = settings.recompute
    if recompute is None:
        fixed = factors.runtime + model + graders + adapter + optimizer
        recompute = available is not None and activations > RESERVE * (available - fixed)
    if recompute:
        activations = int(tokens * width * shape.layers * factors.recomputed * shape.hidden)
        # The layer that is being recomputed. On a CPU the fitted coefficients include it.
        temporary += int(tokens * width * kept * outputs) if device == "cuda" else 0
    rollouts = _rollouts(shape, settings, device, width) if settings.answers else 0
    return Memory(factors.runtime, model, graders, adapter, optimizer, activations, temporary, rollouts, recompute)


def _rollouts(shape: Shape, settings: MemorySettings, device: str, width: int) -> int:
    """Bytes of the sampler's cache and of its logits. The answers to a prompt share its part of the cache."""
    together = min(settings.answers, SAMPLED_ANSWERS[device])
    tokens = min(SAMPLED_TOKENS[device], settings.batch_tokens * together / settings.answers)
    return int(tokens * width * shape.cached) + together * shape.vocabulary * SAMPLED_LOGIT


def _optimizer(settings: MemorySettings, trained: int, *, divided: bool) -> int:
    """Bytes of gradients and moments for so many trained parameters. `divided`: FSDP2 divides both."""
    moments, devices = MOMENT_BYTES[settings.optimizer], settings.devices
    if divided:
        return trained * (4 + moments) // devices
    # Float32. With several devices, a sum is also copied to be sent, and received; each has moments of its share.
    gradients = 4 if devices == 1 else 12
    # An adapter also has a copy of its weights before the last update.
    return trained * (gradients + (0 if settings.rank is None else 4)) + trained * moments // devices


def _divided(shape: Shape, settings: MemorySettings, model: int, width: int) -> int:
    """Bytes of the weights of a device that keeps a part, two gathered layers, and the embeddings or the head."""
    ends = shape.others * width
    gathered = 2 * (model - ends) // shape.layers + ends // (1 if shape.tied else 2)
    return model // settings.devices + gathered


def _weights(shape: Shape, settings: MemorySettings, width: int, factors: Coefficients) -> tuple[int, int]:
    """(bytes of the weights, bytes of the dequantised copies that exist at a time)."""
    in_linears = sum(linear.parameters for linear in shape.linears)
    others = shape.others * width
    if settings.quantization == "none" or (settings.quantization == "fp8" and factors is CPU):
        return in_linears * width + others, 0
    largest = max((linear.outputs * linear.inputs for linear in shape.linears), default=0)
    if settings.quantization == "fp8":  # the backward pass transposes a matrix, and activations are rounded in float32
        widest = max((linear.outputs for linear in shape.linears), default=0)
        return in_linears + others, largest + 8 * BUDGET["cuda"] * widest
    nf4 = NF4_BYTES if settings.double_quantization else NF4_PLAIN
    each = nf4 if settings.quantization == "nf4" else 1.0
    return int(in_linears * each) + others, max(largest * width, int(factors.dequantised * in_linears * width))


def _outputs(shape: Shape, settings: MemorySettings, full: bool) -> float:
    """Mean outputs per layer of all linear layers. Those without an adapter count `UNADAPTED` times."""
    adapted = {linear.name for linear in shape.adapted("all-linear" if full else settings.targets)}
    return sum(
        linear.outputs * linear.count / shape.layers * (1.0 if linear.name in adapted else UNADAPTED)
        for linear in shape.linears
    )
