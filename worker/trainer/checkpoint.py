"""Checkpoints: a folder with `model/`, to use or to train further, and `state/`, to resume exactly.

All files are safetensors or JSON; nothing is pickled. A checkpoint is written under a temporary name and then renamed,
so an existing checkpoint is complete. It holds the hashes of its files. Whoever resumes from it verifies them first.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.spec.json_types import JsonObject
from worker import manifest
from worker.trainer.early_stopping import Best
from worker.trainer.fully_sharded import like, whole
from worker.trainer.methods.method import Method
from worker.trainer.model import Policy
from worker.trainer.ranks import Ranks

COMMON_FILES = ("optimizer", "best")
"""Files in `state/` that any checkpoint may have. All other safetensors files belong to its method."""


@dataclass
class State:
    """The position of a run.

    `step` counts over all stages, `stage_step` within `stage`. `ended`: whether `stage` ended early. `skipped` counts
    the steps that early endings left out.
    """

    stage: str
    step: int = 0
    stage_step: int = 0
    ended: bool = False
    skipped: int = 0
    trained_tokens: int = 0
    history: list[JsonObject] = field(default_factory=list)
    best: Best = field(default_factory=Best)
    pending: dict[str, float] | None = None
    """Metrics of a step whose validation is still to come."""


def save(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    method: Method,
    state: State,
    best: Path,
    ranks: Ranks,
) -> None:
    """Write a checkpoint into `folder`, which must not exist. To be called by all `ranks`; the first one writes.

    `best` is the path of the best weights so far; the file may be missing.
    """
    weights = policy.gathered(ranks)
    own = _optimizer_state(policy, optimizer, ranks)
    # The parts of a divided state have been gathered one by one.
    parts = ranks.gather_first(own) if policy.root is None else [own]
    if parts is None or not ranks.is_first:
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "state").mkdir(parents=True)
    # The model, to use or to train further.
    policy.save(partial / "model", weights)
    # The state, to resume exactly, on any number of ranks.
    tensors = {name: tensor for part, _ in parts for name, tensor in part.items()}
    numbers = {name: values for _, part in parts for name, values in part.items()}
    save_file(tensors, partial / "state" / "optimizer.safetensors")
    for name, method_tensors in method.state_dict().items():
        save_file(method_tensors, partial / "state" / f"{name}.safetensors")
    if best.exists():
        shutil.copyfile(best, partial / "state" / "best.safetensors")
    (partial / "state" / "state.json").write_text(json.dumps(asdict(state) | {"optimizer": numbers}))
    manifest.write(partial)
    partial.rename(folder)


def load_state(folder: Path) -> State:
    """The position of the run in the checkpoint `folder`."""
    fields = json.loads((folder / "state" / "state.json").read_text())
    del fields["optimizer"]
    return State(**fields | {"best": Best(**fields["best"])})


def restore(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, method: Method, best: Path, ranks: Ranks
) -> None:
    """Restore optimizer, method state and best weights from the checkpoint `folder`.

    The caller has already loaded the model from `folder`/model. The first rank copies the best weights to
    `best`. The optimizer gets the state of its own parameters, which may be a part of the policy's.
    """
    state = folder / "state"
    own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    tensors = load_file(state / "optimizer.safetensors")  # named `parameter/key`
    state_json = json.loads((state / "state.json").read_text())
    numbers = state_json["optimizer"]
    for name, parameter in policy.trainable().items():
        if parameter not in own:
            continue
        prefix = name + "/"
        entries = {
            full_name.removeprefix(prefix): tensor
            for full_name, tensor in tensors.items()
            if full_name.startswith(prefix)
        }
        # torch's optimizers keep their step count on the CPU. The moments belong on the parameter's device.
        optimizer.state[parameter] = {
            key: value if key == "step" else like(value, parameter) for key, value in entries.items()
        } | numbers.get(name, {})
    files = {path.stem: path for path in state.glob("*.safetensors")}
    method_state = {name: load_file(path) for name, path in files.items() if name not in COMMON_FILES}
    method.load_state_dict(method_state, state_json["stage_step"])
    if ranks.is_first and (state / "best.safetensors").exists():
        best.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(state / "best.safetensors", best)


def _optimizer_state(
    policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> tuple[dict[str, Tensor], dict[str, JsonObject]]:
    """The state of the optimizer's own parameters: tensors, named `parameter/key`, and numbers by parameter and key.

    The first of `ranks` gets state that is divided among them.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, JsonObject] = {}
    for name, parameter in policy.trainable().items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                gathered = whole(value.detach())
                if ranks.is_first or policy.root is None:
                    tensors[f"{name}/{key}"] = gathered.clone().contiguous().cpu()
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers
