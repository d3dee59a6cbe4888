"""A fault of each kind, always the same ones, into one training: `make faults` does all of them many times."""

import subprocess
import sys
from pathlib import Path

SELECTION = [
    "publish_without_commit",
    "s3_half_uploads",
    "kill_runner_and_trainer",
]


def test_faults_cost_time_and_nothing_else() -> None:
    """As a program of its own, whose proxies and object store are not this process's."""
    arguments = ["--only", *SELECTION, "--times", "1", "--parallel", "1", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "Nothing was wrong." in done.stdout
    for fault in SELECTION:
        assert f"| {fault} | 1 | 0 |" in done.stdout, done.stdout
