"""The measurement on a GPU: all of it in a dry run, and what a part that fails leaves of the others."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.gpu.__main__ import Record, Worker, run
from bench.gpu.parts import PARTS, Part
from tests.helpers.trainer import REPOSITORY

FAKES = """
import os, sys, time
from bench.gpu import parts, worker

def measures():
    yield {"first": 1}
    yield {"second": 2}

def raises():
    yield {"first": 1}
    raise ValueError("no such kernel")

def dies():
    yield {"first": 1}
    os._exit(3)

def hangs():
    yield {"first": 1}
    time.sleep(600)

fakes = {function.__name__: function for function in (measures, raises, dies, hangs)}
parts.Part.run = lambda part: fakes[part.name]()
parts.PARTS.clear()
parts.PARTS.update({name: parts.Part(name, "", 0) for name in fakes})
worker.main()
"""


@pytest.fixture
def worker() -> Iterator[Worker]:
    started = Worker([sys.executable, "-c", FAKES])
    yield started
    started.kill()


@pytest.mark.parametrize(
    ("name", "seconds", "error"),
    [
        ("raises", 60, "ValueError: no such kernel"),
        ("dies", 60, "the process ended with status 3"),
        ("hangs", 5, "stopped after 5 s"),
    ],
)
def test_a_part_that_fails_keeps_the_figures_before_its_failure(
    worker: Worker, tmp_path: Path, name: str, seconds: float, error: str
) -> None:
    """Another part ran before. Its figures are in the file too."""
    record = Record(tmp_path / "gpu.json", dry=True)
    assert run(worker, Part("measures", "", 60), 60, record)
    assert not run(worker, Part(name, "", seconds), seconds, record)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts["measures"].items() >= {"first": 1, "second": 2}.items()
    assert parts[name]["error"] == error
    assert parts[name]["first"] == 1


def test_a_dry_run_measures_every_part(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--dry", "--out", str(tmp_path), "--minutes", "30"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts) == list(PARTS)
    assert {name: figures["error"] for name, figures in parts.items() if "error" in figures} == {}
    assert ended.returncode == 0, ended.stderr
    assert parts["hh"]["dpo-service, ratio to TRL default"] > 0
