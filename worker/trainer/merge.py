"""`python -m worker.trainer.merge FOLDER`: an adapter and its base as one model, tensor by tensor.

FOLDER holds `base/` (a transformers model), `adapter/` (PEFT) and `merge.json` {dtype}; it gets `output/`. Each
merged weight is computed in float32 and rounded once; one file of the base is in memory at a time, so that a model
needs no more than its largest file. LoRA and rsLoRA: W + s BA. DoRA (Liu et al. 2024, Eq. 5): m (W + s BA) / ‖W + s BA‖
with the norm over the inputs of each output.
"""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from worker.trainer.events import UserError

PREFIX = "base_model.model."
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def merge(base: Path, adapter: Path, output: Path, dtype: torch.dtype) -> None:
    """Write the merged model to `output`. Raises `UserError` for an adapter that does not fit the base's files."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    targets = {
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")
    }
    output.mkdir(parents=True)
    merged: set[str] = set()
    files = sorted(base.glob("*.safetensors"))
    for path in files:
        written: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                weight, module = file.get_tensor(name), name.removesuffix(".weight")
                if module in targets:
                    weight = _merged(weight, module, tensors, scale)
                    merged.add(module)
                written[name] = weight.to(dtype) if weight.is_floating_point() else weight
            save_file(written, output / path.name, metadata={"format": "pt"})
    if merged != targets:
        missing = ", ".join(sorted(targets - merged)[:3])
        message = f"The base's files have no weights for {missing}: merge the adapter with PEFT's merge_and_unload."
        raise UserError("not_mergeable", message, "format")
    _describe(base, adapter, output, dtype)


def _merged(weight: Tensor, module: str, tensors: dict[str, Tensor], scale: float) -> Tensor:
    """The weight [outputs, inputs] of `module` with its adapter, in float32."""
    down, up = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].float() for side in "AB")
    changed: Tensor = weight.float() + scale * (up @ down)
    magnitude = tensors.get(f"{PREFIX}{module}.lora_magnitude_vector")
    if magnitude is None:
        return changed
    scaled: Tensor = changed * (magnitude.float() / changed.norm(dim=1))[:, None]
    return scaled


def _describe(base: Path, adapter: Path, output: Path, dtype: torch.dtype) -> None:
    """Everything beside the weights: the base's configuration, the adapter's tokenizer, card and metrics."""
    name = str(dtype).removeprefix("torch.")
    config: dict[str, Any] = json.loads((base / "config.json").read_text())
    config.pop("torch_dtype", None)
    (output / "config.json").write_text(json.dumps(config | {"dtype": name}, indent=2) + "\n")
    for path in [*base.glob("generation_config.json"), *base.glob("*.safetensors.index.json")]:
        shutil.copyfile(path, output / path.name)
    for path in adapter.iterdir():
        if path.is_file() and not path.name.startswith("adapter_"):
            shutil.copyfile(path, output / path.name)
    card = output / "README.md"
    if card.exists():
        text = card.read_text().replace("library_name: peft", "library_name: transformers", 1)
        note = f"\nThe adapter is merged into the unquantised base here, computed in float32 and rounded to {name}.\n"
        card.write_text(text + note)


def main() -> int:
    folder = Path(sys.argv[1])
    dtype = DTYPES[json.loads((folder / "merge.json").read_text())["dtype"]]
    found: dict[str, Any] = {}
    try:
        merge(folder / "base", folder / "adapter", folder / "output", dtype)
    except UserError as error:
        found = {"error": {"code": error.code, "message": error.message, "param": error.param}}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
