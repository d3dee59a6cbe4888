"""The engine's choices by the kind of device: dtypes, kernels, and sizes that keep the device busy.

Code elsewhere asks for the kind only where it asks the driver: for memory, names, or threads. So a test can give the
CPU the choices of a GPU (`BY_KIND`), and no choice waits for a card to run.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hardware:
    """The choices for a kind of device."""

    half: bool
    """Whether it computes in 16 bits: autocast, and the weights of a frozen base."""
    blocks: bool
    """Whether its attention kernel takes a whole pack with a mask in blocks. The others compute tree by tree."""
    pack_tokens: int
    """Tokens of a pack. More of them keep a device busy, and take more memory."""
    head_logits: int
    """Logits in memory at a time. In float32, 16 MB stay in a CPU's cache. A GPU is busy with 1,024 rows of 128k."""
    sampled_tokens: int
    """Maximum tokens of a sampled batch, prompts and answers together."""
    sampled_logits: int
    """Maximum logits of one sampling step, batch size × vocabulary."""
    sampled_answers: int
    """Answers that a training samples together. It may not depend on how many devices share them."""
    checked_tokens: int
    """Tokens of the pack in which segments are checked. A CPU shows differences in small products."""
    extended_share: float
    """By what share of its inputs a product in NF4 may grow, to have its adapters within (see `extended`)."""
    compiled_from: float
    """The FLOPs of a stage from which on compiled layers are the default: they must repay their compilation."""


CPU = Hardware(
    half=False, blocks=False, pack_tokens=2048, head_logits=1 << 22, sampled_tokens=16_384, sampled_logits=1 << 24,
    sampled_answers=32, checked_tokens=256, extended_share=0.0, compiled_from=float("inf"),
)  # fmt: skip
GPU = Hardware(
    half=True, blocks=True, pack_tokens=8192, head_logits=1 << 27, sampled_tokens=131_072, sampled_logits=1 << 27,
    sampled_answers=64, checked_tokens=8192, extended_share=1 / 16, compiled_from=1e17,
)  # fmt: skip
BY_KIND = {"cpu": CPU, "cuda": GPU}


def own_device() -> torch.device:
    """The device of this process: its GPU if it has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hardware(device: torch.device) -> Hardware:
    """The choices for `device`."""
    return BY_KIND[device.type]


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of two matrices of 16 bits, accumulated and returned in `dtype`: float32 or wider."""
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)  # torch has no such product on a CPU


def compute_deterministically() -> None:
    """Let the same inputs have the same bits on a GPU. To be called before the process uses one.

    Sums are added in a fixed order, and cuBLAS gets a workspace of a fixed size. Where torch knows no such way, it
    warns. SDPA's backward pass has one, and uses it only where torch may not warn (`backward_deterministically`).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nobody reads it


def backward_deterministically(attended: Tensor) -> None:
    """Let SDPA, which computed `attended`, add in a fixed order in its backward pass, if all of torch has to."""
    node = attended.grad_fn
    while node is not None and "ScaledDotProduct" not in node.name():  # it may return a part of what it computed
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    if node is None or not torch.are_deterministic_algorithms_enabled():
        return
    node.register_prehook(lambda _: torch.use_deterministic_algorithms(True))
    node.register_hook(lambda *_: warn_again())


def warn_again() -> None:
    """After a backward pass of SDPA, or an error in it: let torch warn of operators without a fixed order."""
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def without_collisions() -> Iterator[None]:
    """Within this context no operator writes to a place twice. So torch need not look for a fixed order of writes."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` of the CPU on `device`. From pinned memory it goes there while the CPU works on."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of `tensors` on the CPU. Waits for their device once, which is the only wait of a step."""
    full = [tensor.detach().flatten().double() for tensor in tensors if tensor.numel()]  # an empty one may be elsewhere
    flat = torch.cat(full).cpu() if full else torch.zeros(0, dtype=torch.float64)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.to(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def recorded(compute: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor] | None:
    """The kernels of `compute`, recorded by a GPU. Each call repeats them, and returns the same tensor. None on a CPU.

    They read what their tensors hold at that time. So `compute` may depend on nothing else, and must have run before. A
    GPU repeats them without Python, which takes longer than the kernels of a small batch. Raises `RuntimeError` if
    `compute` waits for the GPU.
    """
    if device.type != "cuda":
        return None
    graph, stream = torch.cuda.CUDAGraph(), _recording_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # torch.cuda.graph would stay on its stream after an error
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = compute()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def repeat() -> Tensor:
        graph.replay()
        return result

    return repeat


@cache
def _recording_stream() -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def configure_compiler() -> None:
    """Let torch.compile choose kernels by rules, and never by their measured time: ranks and runs choose the same.

    - A layer keeps little for its backward pass. The results of norms and activations are computed again, also where a
      matrix product needs them. No product is.
    - Fused operations round as often as single ones, so it matters little what is fused or computed again.
    - A function is compiled for several kinds of layers before the compiler gives up.
    - Sizes that are equal by chance, such as a rank and a number of segments, are told apart.
    """
    import torch._dynamo
    import torch._functorch.config
    import torch._inductor.config
    import torch.fx.experimental._config

    torch._inductor.config.deterministic = True
    torch._inductor.config.emulate_precision_casts = True
    torch.fx.experimental._config.use_duck_shape = False
    torch._functorch.config.ban_recompute_materialized_backward = False
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
