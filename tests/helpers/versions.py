"""Tests that need more than the oldest libraries with which the trainer's tests are run (`make gpu-check`)."""

import pytest
import transformers
from packaging.version import Version


def needs_transformers(version: str, why: str) -> pytest.MarkDecorator:
    """Skip a test with an older transformers, and say `why`."""
    older = Version(transformers.__version__) < Version(version)
    return pytest.mark.skipif(older, reason=f"transformers {transformers.__version__}: {why}")
