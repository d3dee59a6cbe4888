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

OPTIMIZER, BEST = "optimizer", "best"
"""Files in `state/` that any checkpoint may have, the first in several parts. The others belong to its method."""
FILE_BYTES = 2 << 30
"""The size of a part of the optimizer's state, beyond the last tensor."""


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
    partial = folder.with_name(folder.name + ".partial")
    if ranks.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "state").mkdir(parents=True)
    # The model, to use or to train further.
    weights = policy.gathered(ranks)
    if ranks.is_first:
        policy.save(partial / "model", weights)
    del weights
    # The state, to resume exactly, on any number of ranks.
    numbers = _save_optimizer(partial / "state", policy, optimizer, ranks)
    if not ranks.is_first:
        return
    for name, method_tensors in method.state_dict().items():
        save_file(method_tensors, partial / "state" / f"{name}.safetensors")
    if best.exists():
        shutil.copyfile(best, partial / "state" / f"{BEST}.safetensors")
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
    files = state.glob(f"{OPTIMIZER}*.safetensors")
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}  # named `parameter/key`
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
    others = [path for path in state.glob("*.safetensors") if path.stem != BEST and not path.stem.startswith(OPTIMIZER)]
    method_state = {path.stem: load_file(path) for path in others}
    method.load_state_dict(method_state, state_json["stage_step"])
    if ranks.is_first and (state / f"{BEST}.safetensors").exists():
        best.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(state / f"{BEST}.safetensors", best)


def _save_optimizer(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> dict[str, JsonObject]:
    """Write the tensors of the optimizer's state, named `parameter/key`, into files of `folder`.

    State that is divided among ranks is gathered tensor by tensor, and goes to a file as soon as it fills one. Returns
    the numbers of the state, by parameter and key. Only the first rank writes, and gets all numbers.
    """
    tensors, numbers, written = dict[str, Tensor](), dict[str, JsonObject](), 0

    def write(parts: dict[str, Tensor]) -> None:
        nonlocal written
        if ranks.is_first:
            written += 1
            save_file(parts, folder / f"{OPTIMIZER}{'' if written == 1 else f'-{written}'}.safetensors")

    for name, parameter in policy.trainable().items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                numbers.setdefault(name, {})[key] = value
                continue
            gathered = whole(value.detach())
            if ranks.is_first or policy.root is None:
                tensors[f"{name}/{key}"] = gathered.clone().contiguous().cpu()
        if policy.root is not None and sum(tensor.nbytes for tensor in tensors.values()) > FILE_BYTES:
            write(tensors)
            tensors = {}
    if policy.root is not None:
        if tensors or not written:
            write(tensors)
        return numbers
    parts = ranks.gather_first((tensors, numbers)) or []  # each rank has the state of its own parameters
    write({name: tensor for part, _ in parts for name, tensor in part.items()})
    return {name: values for _, part in parts for name, values in part.items()}
