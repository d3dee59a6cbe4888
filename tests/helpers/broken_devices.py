"""Broken devices without a GPU: modules that Python loads at its start, and that break torch while a file exists."""

from collections.abc import Iterable
from pathlib import Path

BACKWARD = """
import os, sys

if any(argument.startswith("worker.trainer") for argument in sys.orig_argv):
    import torch

    def broken(compute):
        def run(*arguments, **options):
            if os.path.exists({switch!r}):
                raise torch.AcceleratorError({error!r})
            return compute(*arguments, **options)
        return run

    torch.autograd.backward, torch.autograd.grad = map(broken, (torch.autograd.backward, torch.autograd.grad))
"""
"""While the file `switch` exists, each backward pass fails as on a broken GPU."""
LIBRARY = """
import os, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "torch" and os.path.exists({switch!r}):
            raise ImportError({error!r})

sys.meta_path.insert(0, Finder())
"""
"""While the file exists, a library of the driver is missing: torch cannot be imported."""
NUMBERS = """
import os, sys

if any(argument.startswith("worker.trainer") for argument in sys.orig_argv):
    import torch

    def wrong(compute):
        def run(*arguments, **options):
            result = compute(*arguments, **options)
            return result * float({error!r}) if os.path.exists({switch!r}) else result
        return run

    torch.nn.functional.linear, torch.Tensor.__matmul__ = map(wrong, (torch.nn.functional.linear, torch.Tensor.__matmul__))
"""
"""While the file exists, each product of matrices is multiplied by `error`."""
BROKEN = {
    "library": (LIBRARY, "libcudart.so.13: not found"),
    "backward": (BACKWARD, "CUDA error: uncorrectable ECC error encountered"),
    "numbers": (NUMBERS, "nan"),
}
"""Ways in which a device is broken: the code that breaks it, and the error."""


def breakable(folder: Path, ways: Iterable[str] = tuple(BROKEN)) -> dict[str, str]:
    """The variables of a worker whose device is broken in one of `ways` while a file of that name is in `folder`."""
    site = folder / "site"
    site.mkdir(parents=True, exist_ok=True)
    parts = [BROKEN[way][0].format(switch=str(folder / way), error=BROKEN[way][1]) for way in ways]
    (site / "sitecustomize.py").write_text("".join(parts))
    return {"PYTHONPATH": str(site)}
