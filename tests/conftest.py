"""Environment of all tests: no hub can be reached, and the settings of the user who runs them do not apply."""

import gc
import os

import pytest

pytest.register_assert_rewrite("tests.helpers")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models of the tests are tiny. More threads would cost more time than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith(("DPO_", "AWS_")) and name != "DPO_SHARED"]:
    del os.environ[name]


def pytest_collection_finish() -> None:
    """Keep the garbage collector out of the libraries: with torch and its peers loaded, a collection takes 0.4 s."""
    gc.collect()
    gc.freeze()
