"""Environment of all tests: no hub can be reached, and the settings of the user who runs them do not apply."""

import gc
import os
from collections.abc import Iterator

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

LONG = {"acceptance", "faults", "trainer"}
SHARING = {
    "one service": {"test_dashboard", "test_evaluations", "test_gates_and_sweeps", "test_life_cycle"},
    "a service on each stack": {"test_main_path", "test_official_client", "test_service"},
}
"""Acceptance tests that leave a service running. Each group is a process's work, so it starts the service once."""

pytest.register_assert_rewrite("tests.helpers")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models of the tests are tiny. More threads would cost more time than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith(("DPO_", "AWS_")) and name != "DPO_SHARED"]:
    del os.environ[name]


@pytest.fixture(autouse=True)
def kept_umask() -> Iterator[None]:
    """Commands that run in this process close their files to other users, which servers of later tests may be."""
    umask = os.umask(0o022)
    os.umask(umask)
    yield
    os.umask(umask)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin the long modules first. At the end only short ones are left, which keep all processes busy."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
    """A module's tests run in one process, and so do those of the modules of a group."""

    def _split_scope(self, nodeid: str) -> str:
        module: str = super()._split_scope(nodeid)
        folder, _, name = module.removesuffix(".py").rpartition("/")
        groups = (group for group, names in SHARING.items() if folder == "tests/acceptance" and name in names)
        return next(groups, module)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """Keep the garbage collector out of the libraries: with torch and its peers loaded, a collection takes 0.4 s."""
    gc.collect()
    gc.freeze()
