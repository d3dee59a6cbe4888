"""Tests that need more than the oldest libraries with which the trainer's tests are run (`make gpu-check`)."""

import pytest
import torch
import transformers
from packaging.version import Version


def needs_transformers(version: str, why: str) -> pytest.MarkDecorator:
    """Skip a test with an older transformers, and say `why`."""
    older = Version(transformers.__version__) < Version(version)
    return pytest.mark.skipif(older, reason=f"transformers {transformers.__version__}: {why}")


CAPPED = needs_transformers("5.23", "its SDPA leaves out the soft cap of Gemma 2")
FP8_ON_A_CPU = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason=f"torch {torch.__version__}: no products by rows in FP8 on a CPU",
)
