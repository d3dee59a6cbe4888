"""What all tests share: nothing may reach a hub, and the environment of the person who runs them stays out."""

import os

import pytest

pytest.register_assert_rewrite("tests.helpers")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models here are tiny: threads that wait for each other cost more than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith(("DPO_", "AWS_")) and name != "DPO_SHARED"]:
    del os.environ[name]
