"""Early stopping: the best validation of a stage, and the weights it was made with."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from app.spec.hyperparameters import EarlyStopping
from worker.trainer.model import Policy


@dataclass
class Best:
    """What is known of a stage's validations; kept in checkpoints."""

    value: float | None = None
    step: int = 0
    without: int = 0
    """Validations since then."""

    def improves(self, settings: EarlyStopping, metrics: dict[str, float], step: int) -> bool:
        """Take the validation of `step` into account; whether it is the best so far."""
        value = metrics[settings.metric]
        gain = 0.0 if self.value is None else value - self.value
        if settings.metric == "eval/loss":
            gain = -gain
        if self.value is None or gain > settings.min_delta:
            self.value, self.step, self.without = value, step, 0
            return True
        self.without += 1
        return False


def keep(policy: Policy, path: Path) -> None:
    """Write what trains to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().contiguous() for name, p in policy.trainable().items()}, path)


def bring_back(policy: Policy, path: Path) -> None:
    """Give `policy` the weights in `path`."""
    kept = load_file(path)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            parameter.copy_(kept[name])
