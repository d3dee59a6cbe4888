"""One fault of each kind, always the same ones. `make faults` injects all faults many times."""

import subprocess
import sys
from pathlib import Path

SELECTION = [
    "publish_without_commit",
    "s3_half_uploads",
    "kill_runner_and_trainer",
]


def test_faults_cost_time_and_nothing_else() -> None:
    """Run as a separate program, which has its own proxies and object store."""
    arguments = ["--only", *SELECTION, "--times", "1", "--parallel", "1", "--seed", "3"]
    completed = subprocess.run(
        [sys.executable, "-m", "tests.faults", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr[-3000:]
    assert "Nothing was wrong." in completed.stdout
    for fault in SELECTION:
        assert f"| {fault} | 1 | 0 |" in completed.stdout, completed.stdout
