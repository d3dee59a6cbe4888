"""Environment of all tests: no hub can be reached, and the settings of the user who runs them do not apply."""

import gc
import os

import pytest

LONG = {"acceptance", "faults", "trainer"}

pytest.register_assert_rewrite("tests.helpers")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models of the tests are tiny. More threads would cost more time than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith(("DPO_", "AWS_")) and name != "DPO_SHARED"]:
    del os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin the long modules first. At the end only short ones are left, which keep all processes busy."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)


def pytest_collection_finish() -> None:
    """Keep the garbage collector out of the libraries: with torch and its peers loaded, a collection takes 0.4 s."""
    gc.collect()
    gc.freeze()
