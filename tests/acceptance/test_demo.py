"""The demo notices a training that makes the model no better."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_demo_fails_when_chosen_and_rejected_are_swapped(tmp_path: Path) -> None:
    """`make demo` shows that it succeeds on the right data. This test shows that it can fail."""
    demo = subprocess.run(
        [sys.executable, "-m", "demo", "--swap"],
        env=os.environ | {"DPO_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert demo.returncode == 1, demo.stdout[-3000:] + demo.stderr[-3000:]
    assert "Not better: the held-out reward accuracy" in demo.stdout
    assert "Not better: DPO is not above SFT" in demo.stdout
