"""The card: its versions and speed, and whether the tests that need one pass on it."""

import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from app.spec.json_types import JsonObject
from bench.gpu import shapes
from bench.gpu.shapes import DEVICE, seconds_of

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "triton", "liger-kernel", "unsloth", "flash-attn")
DATA_SHEET = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bfloat16 TFLOP/s by the makers' data sheets, by a part of the card's name."""


def figures() -> Iterator[JsonObject]:
    """Versions, the speed of large products and copies, and NF4 against float64 on a CPU."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    yield {"device": name} | {package: installed(package) for package in PACKAGES}
    if DEVICE.type == "cuda":
        yield {"memory_bytes": torch.cuda.get_device_properties(DEVICE).total_memory}
    yield {"data_sheet_tflops": next((peak for part, peak in DATA_SHEET.items() if part in name), None)}
    yield {"product_tflops": product_flops() / 1e12}
    yield {"copy_gb_per_second": _copied_bytes() / 1e9}
    yield from _nf4()


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def product_flops() -> float:
    """FLOP/s of a large product of random bfloat16 matrices. Constants would draw less power, and so run faster."""
    size = 512 if shapes.dry else 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    times = 1 if shapes.dry else 300  # long enough for the clock to settle: about half a second

    def products() -> None:
        for _ in range(times):
            a @ b

    return 2 * size**3 * times / seconds_of(products, 2)


def _copied_bytes() -> float:
    """Bytes a second that a copy within the memory reads and writes."""
    size = 1 << (20 if shapes.dry else 30)
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * size / seconds_of(lambda: target.copy_(source))


def _nf4() -> Iterator[JsonObject]:
    """The dequantised weight, a product and its gradient, against those of a CPU in float64. Relative errors."""
    from bitsandbytes.functional import QuantState, dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    rows, columns, tokens = (64, 128, 32) if shapes.dry else (4096, 14_336, 8192)
    layer = Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    weight = torch.randn(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    layer.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to(DEVICE)
    state = layer.weight.quant_state

    def dequantised() -> Tensor:
        values: Tensor = dequantize_4bit(layer.weight.data, state)
        return values

    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    gradient = torch.randn(tokens, rows, dtype=torch.bfloat16, device=DEVICE)

    def both() -> tuple[Tensor, Tensor]:
        output = layer(x)
        return output.detach(), torch.autograd.grad(output, x, gradient)[0]

    times = 1 if shapes.dry else 50

    def many() -> None:
        for _ in range(times):
            dequantised()

    yield {"dequantised_gb_per_second": 2 * weight.numel() * times / seconds_of(many) / 1e9}
    flops = 4 * rows * columns * tokens
    yield {"nf4_product_and_gradient_tflops": flops / seconds_of(both) / 1e12}
    output, grad_x = both()
    few = slice(0, 64)  # tokens
    wide = dequantised().double().cpu()
    yield {
        "nf4_product_error": _error(output[few], x.detach()[few].double().cpu() @ wide.T),
        "nf4_gradient_error": _error(grad_x[few], gradient[few].double().cpu() @ wide),
    }
    # On a CPU the same bytes give the same weight.
    held = {name: value.cpu() for name, value in state.as_dict(packed=True).items()}
    on_cpu = dequantize_4bit(layer.weight.data.cpu(), QuantState.from_dict(held, torch.device("cpu")))
    yield {"nf4_weights_equal_those_of_a_cpu": bool(torch.equal(on_cpu.double(), wide))}


def _error(values: Tensor, expected: Tensor) -> float:
    return float((values.double().cpu() - expected).abs().max() / expected.abs().max())


def tests() -> Iterator[JsonObject]:
    """The tests of the trainer that need a GPU, in a process of their own."""
    repository = Path(__file__).parents[2]
    chosen = "test_flex_attention_equals_the_cpus_kernels and gpt2" if shapes.dry else ""
    with tempfile.TemporaryDirectory() as name:
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", f"{name}/tests",
            "tests/unit/trainer/test_cuda.py", "-k", chosen,
        ]  # fmt: skip
        ended = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    lines = ended.stdout.splitlines()
    failed = [line for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    yield {"status": ended.returncode, "summary": lines[-1] if lines else ended.stderr[-500:], "failed": failed}
