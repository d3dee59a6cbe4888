"""Checkpoints: a folder with `model/`, to use or to train on, and `state/`, to go on as if nothing had happened.

Everything is safetensors or JSON; nothing is pickled. A checkpoint is written beside its place and renamed, so
that one that is there is whole.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from worker.trainer.model import Policy


@dataclass
class State:
    """Where a run is. `step` counts over all stages; `stage_step` within `stage`."""

    stage: str
    step: int = 0
    stage_step: int = 0
    trained_tokens: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def save(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: State,
    reference: tuple[Tensor, Tensor] | None,
) -> None:
    """Write a checkpoint into `folder`, which must not exist."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "state").mkdir(parents=True)
    policy.save(partial / "model")
    save_file(_optimizer_tensors(policy, optimizer), partial / "state" / "optimizer.safetensors")
    save_file(_generators(policy), partial / "state" / "generators.safetensors")
    if reference is not None:
        save_file({"train": reference[0], "validation": reference[1]}, partial / "state" / "reference.safetensors")
    (partial / "state" / "state.json").write_text(json.dumps(asdict(state)))
    partial.rename(folder)


def load_state(folder: Path) -> State:
    return State(**json.loads((folder / "state" / "state.json").read_text()))


def load_reference(folder: Path) -> tuple[Tensor, Tensor] | None:
    path = folder / "state" / "reference.safetensors"
    if not path.exists():
        return None
    tensors = load_file(path)
    return tensors["train"], tensors["validation"]


def restore(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Put the optimizer's state and the random generators back; the model was loaded from `folder`/model."""
    tensors = load_file(folder / "state" / "optimizer.safetensors")
    for name, parameter in policy.trainable().items():
        prefix = name + "/"
        entries = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        # AdamW keeps its step count on the CPU; the moments belong where the parameter is.
        optimizer.state[parameter] = {
            key: value if key == "step" else value.to(parameter.device) for key, value in entries.items()
        }
    generators = load_file(folder / "state" / "generators.safetensors")
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and policy.device.type == "cuda":
        torch.cuda.set_rng_state(generators["cuda"])


def _optimizer_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().clone().contiguous()
        for name, parameter in policy.trainable().items()
        for key, value in optimizer.state[parameter].items()
    }


def _generators(policy: Policy) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if policy.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states
