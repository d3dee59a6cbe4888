"""`python -m worker.trainer.device_check KIND`: check the device by a small computation, compared with the CPU's.

The exit status is 0 if the device computes what the CPU does. Else standard output says what is wrong.
"""

import re
import sys

import torch

SIZE, ROUNDS = 512, 4
TOLERANCE = 1e-4
"""Largest relative difference between float32 on the device and float64 on the CPU."""
FAULTS = re.compile(r"CUDA|CUBLAS|CUDNN|cuDNN|cuSOLVER|cuSPARSE|NCCL|NVML|HIP error|unspecified launch failure")
"""Matches the errors of a GPU, of its driver and of its libraries. All of them are plain `RuntimeError`s."""


def is_device_fault(error: BaseException) -> bool:
    """Whether an error may be the device's fault. One of the job may look the same, such as a failed device assert."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and FAULTS.search(str(error)) is not None
    )


def why_unusable(kind: str) -> str | None:
    """Why torch cannot use a device of this kind (cuda or cpu) here; None if it can."""
    if kind == "cpu":
        return None
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:  # no CUDA in this torch; no driver, an old one, or no GPU
        return f"torch finds no usable GPU: {str(error).splitlines()[0]}"
    return None


def check(kind: str) -> str | None:
    """Multiply matrices on each device of a kind, forward and backward. Returns what is wrong; None if nothing is."""
    if (reason := why_unusable(kind)) is not None:
        return reason
    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if kind == "cuda" else [kind]
    problems = [problem for name in names if (problem := _problem_of(name)) is not None]
    return problems[0] if problems else None


def _problem_of(device: str) -> str | None:
    """The fault in the results of one device; None if there is none."""
    generator = torch.Generator().manual_seed(0)
    try:
        for _ in range(ROUNDS):
            x, w = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))  # [n, n]
            results = []
            for place, dtype in ((device, torch.float32), ("cpu", torch.float64)):
                left, right = (tensor.to(place, dtype).detach().requires_grad_() for tensor in (x, w))
                product = left @ right  # [n, n]
                gradients = torch.autograd.grad(product.square().sum(), (left, right))
                results.append([tensor.detach().double().cpu() for tensor in (product, *gradients)])
            for mine, exact in zip(*results, strict=True):
                difference = float((mine - exact).abs().max() / exact.abs().max())
                if not difference < TOLERANCE:
                    return (
                        f"a product of matrices on it differs from the CPU's by {difference:.1e} of its largest entry"
                    )
    except RuntimeError as error:
        return f"a small computation on it fails: {str(error).splitlines()[0]}"
    return None


def main() -> int:
    """Check the device whose kind is on the command line."""
    problem = check(sys.argv[1])
    if problem is not None:
        print(problem)
    return 0 if problem is None else 1


if __name__ == "__main__":
    sys.exit(main())
