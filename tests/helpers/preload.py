"""Programs that see another machine: C files of this folder replace functions of the system's library."""

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler on this machine")


def preloaded(source: str, folder: Path) -> dict[str, str]:
    """The environment of a program that loads the C file `source` of this folder first. It is compiled in `folder`."""
    library = folder / source.replace(".c", ".so")
    file = str(Path(__file__).with_name(source))
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-O2", "-o", str(library), file, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


def wrong_clock(seconds: int, folder: Path) -> dict[str, str]:
    """The environment of a program on a host whose clock is `seconds` off."""
    return preloaded("wrong_clock.c", folder) | {"CLOCK_OFFSET": str(seconds)}
