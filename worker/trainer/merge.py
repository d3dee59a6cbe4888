"""`python -m worker.trainer.merge FOLDER`: merge an adapter into its base, tensor by tensor.

FOLDER holds `base` (a transformers model, or a file with its path), `start/` (a PEFT adapter) and `merge.json` {dtype}.
The merged model goes to `output/`. Each merged weight is computed in float32 and rounded once. Only one file of the
base is in memory at a time, so a merge needs memory for the largest file.

- LoRA and rsLoRA: W + s BA.
- DoRA (Liu et al. 2024, Eq. 5): m (W + s BA) / ‖W + s BA‖, with the norm over the inputs of each output.

Some adapters sit on weights that the files do not hold as single tensors, for example experts that transformers joins
into one tensor. PEFT merges these with the whole model in memory.
"""

import json
import math
import shutil
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.spec.json_types import JsonObject
from worker.model_files import INDEX, config_of, folder_at, prequantized, weight_files
from worker.trainer.errors import UserError, first_line
from worker.trainer.memory import fits_as_float32
from worker.trainer.model import HALF_DTYPES
from worker.trainer.naming import DOWN, PREFIX, WeightPlace, places

MERGEABLE = (DOWN, ".lora_B.weight", ".lora_magnitude_vector")
"""Endings of the tensor names of an adapter that can be merged file by file."""


def merge(base: Path, adapter: Path, output: Path, dtype: torch.dtype) -> None:
    """Write the merged model to `output`. Raises `UserError` for an adapter that does not fit the base."""
    method = prequantized(config_of(base))
    if method is not None:
        message = f"The base is quantised ({method}). An adapter cannot be merged into quantised weights."
        raise UserError("not_mergeable", message, "format")
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    output.mkdir(parents=True)
    changed_weights = _places(base, tensors)
    if changed_weights is None:
        _merge_in_memory(base, adapter, set(tensors), output, dtype)
    else:
        _merge_by_file(base, output, dtype, config, tensors, changed_weights)
    _describe(base, adapter, output, dtype)


def _places(base: Path, tensors: dict[str, Tensor]) -> dict[str, WeightPlace] | None:
    """The weights that the adapter changes, by their names in the base's files.

    None if the files do not hold all of them as single tensors.
    """
    modules = {name.removeprefix(PREFIX).removesuffix(DOWN) for name in tensors if name.endswith(DOWN)}
    if any(not name.startswith(PREFIX) or not name.endswith(MERGEABLE) for name in tensors):
        return None
    weight_places = places(base, modules)
    return weight_places if {place.module for place in weight_places.values()} == modules else None


def _merge_by_file(
    base: Path,
    output: Path,
    dtype: torch.dtype,
    config: JsonObject,
    tensors: dict[str, Tensor],
    places: dict[str, WeightPlace],
) -> None:
    """Merge one file of the base at a time. `places` are the weights that the adapter changes."""
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    for path in weight_files(base):
        merged: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                weight, place = file.get_tensor(name), places.get(name)
                if place is not None and place.transposed:
                    weight = _merged(weight.t(), place.module, tensors, scale).t().contiguous()
                elif place is not None:
                    weight = _merged(weight, place.module, tensors, scale)
                merged[name] = weight.to(dtype) if weight.is_floating_point() else weight
            save_file(merged, output / path.name, metadata={"format": "pt"})
    if (base / INDEX).exists():
        shutil.copyfile(base / INDEX, output / INDEX)


def _merged(weight: Tensor, module: str, tensors: dict[str, Tensor], scale: float) -> Tensor:
    """The weight [outputs, inputs] of `module` merged with its adapter, in float32."""
    # down, A: [rank, inputs]; up, B: [outputs, rank]; magnitude, m: [outputs].
    down, up = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].float() for side in "AB")
    changed: Tensor = weight.float() + scale * (up @ down)
    magnitude = tensors.get(f"{PREFIX}{module}.lora_magnitude_vector")
    if magnitude is None:
        return changed
    scaled: Tensor = changed * (magnitude.float() / changed.norm(dim=1))[:, None]
    return scaled


def _merge_in_memory(base: Path, adapter: Path, tensors: set[str], output: Path, dtype: torch.dtype) -> None:
    """Merge with PEFT, with the whole model in memory. All `tensors` of the adapter must fit the model."""
    if not fits_as_float32(base):
        message = (
            "The adapter changes weights that the base's files do not hold as single tensors, and the whole model does "
            "not fit into this worker's memory. Merge it with PEFT's merge_and_unload on a larger machine."
        )
        raise UserError("not_mergeable", message, "format")
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing tensors are checked below
            adapted = PeftModel.from_pretrained(model, adapter)
    except (ValueError, RuntimeError, KeyError) as error:
        message = f"The adapter does not fit the base: {first_line(error)}."
        raise UserError("not_mergeable", message, "format") from error
    mismatched = tensors ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if mismatched:
        message = f"The adapter does not fit the base: {', '.join(sorted(mismatched)[:3])}."
        raise UserError("not_mergeable", message, "format")
    adapted.merge_and_unload().to(dtype).save_pretrained(output)


def _describe(base: Path, adapter: Path, output: Path, dtype: torch.dtype) -> None:
    """Write all files beside the weights: the base's configuration, the adapter's tokenizer, card and metrics."""
    name = str(dtype).removeprefix("torch.")
    config: JsonObject = json.loads((base / "config.json").read_text())
    config.pop("torch_dtype", None)
    config_path = output / "config.json"
    if not config_path.exists() or json.loads(config_path.read_text())["model_type"] == config["model_type"]:
        config_path.write_text(json.dumps(config | {"dtype": name}, indent=2) + "\n")
    for path in base.glob("generation_config.json"):
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
    """Merge in the folder of the command line, and print `{}` or the error as JSON."""
    folder = Path(sys.argv[1])
    dtype = HALF_DTYPES[json.loads((folder / "merge.json").read_text())["dtype"]]
    result: JsonObject = {}
    try:
        merge(folder_at(folder / "base"), folder / "start", folder / "output", dtype)
    except UserError as error:
        result = {"error": {"code": error.code, "message": error.message, "param": error.param}}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
