"""The recipe of CONTRIBUTING.md for a new loss, followed as it is written."""

import math
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
USE_THE_LOSS = """
import torch
from app.spec.job import JobSpec
from worker.trainer.objectives import losses_of, rewards_of
from worker.trainer.objectives.batch import Batch

method = {"type": "dpo", "dpo": {"hyperparameters": {"loss": "exponential"}}}
spec = JobSpec.model_validate({"model": "base", "training_file": "pairs", "method": method}).resolved()
present, desirable = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
batch = Batch(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2), torch.ones(1, 2), present, desirable, 1.0)
print(losses_of(batch, spec.method.hyperparameters).item(), *rewards_of(batch, spec.method.hyperparameters)[0].tolist())
"""


def test_the_recipe_for_a_loss_works_as_it_is_written(tmp_path: Path) -> None:
    recipe = (REPOSITORY / "CONTRIBUTING.md").read_text().split("## A new loss")[1].split("\n## ")[0]
    record, function = (textwrap.dedent(code) for code in re.findall(r"```python\n(.*?)```", recipe, re.DOTALL))
    for package in ("app", "worker"):
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    records = tmp_path / "app" / "spec" / "losses.py"
    records.write_text(records.read_text().replace("LOSSES = {\n", "LOSSES = {\n" + record, 1))
    functions = tmp_path / "worker" / "trainer" / "objectives" / "preference.py"
    functions.write_text(functions.read_text() + "\n\n" + function)

    process = subprocess.run(
        [sys.executable, "-c", USE_THE_LOSS], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    loss, chosen, rejected = map(float, process.stdout.split())
    assert math.isclose(loss, math.exp(-0.1 * (3.0 - 1.0)), rel_tol=1e-6)
    assert math.isclose(chosen, 0.3, rel_tol=1e-6) and math.isclose(rejected, 0.1, rel_tol=1e-6)
