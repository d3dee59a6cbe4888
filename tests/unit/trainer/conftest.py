"""Tiny models, made once for the whole session."""

import os

# The trainer's process sets these for itself; tests that run it in their own process need them before any import.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TQDM_DISABLE="1",
    HF_DATASETS_OFFLINE="1",
)

from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_model import make_tiny_model

torch.set_num_threads(1)  # these models are too small to gain from more, and tests share the machine


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("qwen3"), architecture="qwen3")


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("mistral"), architecture="mistral")
