"""The demo tells a better model from a worse one."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_demo_fails_when_chosen_and_rejected_are_swapped(tmp_path: Path) -> None:
    """`make demo` itself shows that it passes on the truth; this shows that it can fail."""
    done = subprocess.run(
        [sys.executable, "-m", "demo", "--swap"],
        env=os.environ | {"DPO_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Not better: the held-out reward accuracy" in done.stdout
    assert "Not better: DPO is not above SFT" in done.stdout
