"""Checkpoints: a folder with `model/`, to use or to train on, and `state/`, to go on as if nothing had happened.

Everything is safetensors or JSON; nothing is pickled. A checkpoint is written beside its place and renamed, so
that one that is there is whole, and it holds the hashes of its files: whoever resumes from it looks at them first.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from worker import manifest
from worker.trainer.early_stopping import Best
from worker.trainer.methods.method import Method
from worker.trainer.model import Policy

OURS = ("optimizer", "generators", "best")
"""The files of a checkpoint's state that are not its method's."""


@dataclass
class State:
    """Where a run is.

    `step` counts over all stages; `stage_step` within `stage`, which `ended` early or not; `skipped` counts the steps
    that stages which did leave out.
    """

    stage: str
    step: int = 0
    stage_step: int = 0
    ended: bool = False
    skipped: int = 0
    trained_tokens: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: Best = field(default_factory=Best)
    pending: dict[str, float] | None = None
    """The metrics of a step that is not validated yet."""


def save(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, method: Method, state: State, best: Path
) -> None:
    """Write a checkpoint into `folder`, which must not exist. `best` is the file of the best weights, if it exists."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "state").mkdir(parents=True)
    policy.save(partial / "model")
    tensors, numbers = _optimizer_state(policy, optimizer)
    save_file(tensors, partial / "state" / "optimizer.safetensors")
    save_file(_generators(policy), partial / "state" / "generators.safetensors")
    for name, kept in method.state_dict().items():
        save_file(kept, partial / "state" / f"{name}.safetensors")
    if best.exists():
        shutil.copyfile(best, partial / "state" / "best.safetensors")
    (partial / "state" / "state.json").write_text(json.dumps(asdict(state) | {"optimizer": numbers}))
    manifest.write(partial)
    partial.rename(folder)


def load_state(folder: Path) -> State:
    found = json.loads((folder / "state" / "state.json").read_text())
    del found["optimizer"]
    return State(**found | {"best": Best(**found["best"])})


def restore(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, method: Method, best: Path) -> None:
    """Put back what the model's folder does not hold; the model was loaded from `folder`/model."""
    state = folder / "state"
    tensors = load_file(state / "optimizer.safetensors")
    described = json.loads((state / "state.json").read_text())
    numbers = described["optimizer"]
    for name, parameter in policy.trainable().items():
        prefix = name + "/"
        entries: dict[str, Any] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        # torch's optimizers keep their step count on the CPU; the moments belong where the parameter is.
        optimizer.state[parameter] = {
            key: value if key == "step" else value.to(parameter.device) for key, value in entries.items()
        } | numbers.get(name, {})
    generators = load_file(state / "generators.safetensors")
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and policy.device.type == "cuda":
        torch.cuda.set_rng_state(generators["cuda"])
    files = {path.stem: path for path in state.glob("*.safetensors")}
    kept = {name: load_file(path) for name, path in files.items() if name not in OURS}
    method.load_state_dict(kept, described["stage_step"])
    if (state / "best.safetensors").exists():
        best.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(state / "best.safetensors", best)


def _optimizer_state(
    policy: Policy, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """(tensors by parameter and key, plain numbers by parameter)."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in policy.trainable().items():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach().clone().contiguous()
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def _generators(policy: Policy) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if policy.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states
