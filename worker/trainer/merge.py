"""`python -m worker.trainer.merge FOLDER`: an adapter and its base as one model, tensor by tensor.

FOLDER holds `base/` (a transformers model), `adapter/` (PEFT) and `merge.json` {dtype}; it gets `output/`. Each
merged weight is computed in float32 and rounded once; one file of the base is in memory at a time, so that a model
needs no more than its largest file. LoRA and rsLoRA: W + s BA. DoRA (Liu et al. 2024, Eq. 5): m (W + s BA) / ‖W + s BA‖
with the norm over the inputs of each output. An adapter on what the files do not hold so, experts that transformers
makes one tensor of for example, is merged by PEFT, with the whole model in memory.
"""

import json
import math
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from worker.model_files import INDEX, config_of, prequantized, weight_files
from worker.trainer.errors import UserError, first_line
from worker.trainer.memory import fits_as_float32
from worker.trainer.model import HALVES
from worker.trainer.naming import DOWN, PREFIX, WeightPlace, places

PARTS = (DOWN, ".lora_B.weight", ".lora_magnitude_vector")


def merge(base: Path, adapter: Path, output: Path, dtype: torch.dtype) -> None:
    """Write the merged model to `output`. Raises `UserError` for an adapter that does not fit the base."""
    method = prequantized(config_of(base))
    if method is not None:
        message = f"The base is quantised ({method}): nothing can be merged into such weights."
        raise UserError("not_mergeable", message, "format")
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    output.mkdir(parents=True)
    found = _places(base, tensors)
    if found is None:
        _merge_in_memory(base, adapter, set(tensors), output, dtype)
    else:
        _merge_by_file(base, output, dtype, config, tensors, found)
    _describe(base, adapter, output, dtype)


def _places(base: Path, tensors: dict[str, Tensor]) -> dict[str, WeightPlace] | None:
    """By the names in the base's files, the weights that the adapter changes; None where they are not there as such."""
    modules = {name.removeprefix(PREFIX).removesuffix(DOWN) for name in tensors if name.endswith(DOWN)}
    if any(not name.startswith(PREFIX) or not name.endswith(PARTS) for name in tensors):
        return None
    found = places(base, modules)
    return found if {place.module for place in found.values()} == modules else None


def _merge_by_file(
    base: Path,
    output: Path,
    dtype: torch.dtype,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    places: dict[str, WeightPlace],
) -> None:
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    for path in weight_files(base):
        written: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                weight, target = file.get_tensor(name), places.get(name)
                if target is not None and target.transposed:
                    weight = _merged(weight.t(), target.module, tensors, scale).t().contiguous()
                elif target is not None:
                    weight = _merged(weight, target.module, tensors, scale)
                written[name] = weight.to(dtype) if weight.is_floating_point() else weight
            save_file(written, output / path.name, metadata={"format": "pt"})
    if (base / INDEX).exists():
        shutil.copyfile(base / INDEX, output / INDEX)


def _merged(weight: Tensor, module: str, tensors: dict[str, Tensor], scale: float) -> Tensor:
    """The weight [outputs, inputs] of `module` with its adapter, in float32."""
    down, up = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].float() for side in "AB")
    changed: Tensor = weight.float() + scale * (up @ down)
    magnitude = tensors.get(f"{PREFIX}{module}.lora_magnitude_vector")
    if magnitude is None:
        return changed
    scaled: Tensor = changed * (magnitude.float() / changed.norm(dim=1))[:, None]
    return scaled


def _merge_in_memory(base: Path, adapter: Path, tensors: set[str], output: Path, dtype: torch.dtype) -> None:
    """`tensors` names what the adapter has, all of which must find its place."""
    if not fits_as_float32(base):
        message = (
            "The adapter sits on weights that the base's files do not hold as such, and the whole model does not fit "
            "into this worker's memory: merge it with PEFT's merge_and_unload on a larger machine."
        )
        raise UserError("not_mergeable", message, "format")
    model: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is missing is looked at below
            adapted: Any = PeftModel.from_pretrained(model, adapter)
    except (ValueError, RuntimeError, KeyError) as error:
        message = f"The adapter does not fit the base: {first_line(error)}."
        raise UserError("not_mergeable", message, "format") from error
    strange = tensors ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if strange:
        message = f"The adapter does not fit the base: {', '.join(sorted(strange)[:3])}."
        raise UserError("not_mergeable", message, "format")
    adapted.merge_and_unload().to(dtype).save_pretrained(output)


def _describe(base: Path, adapter: Path, output: Path, dtype: torch.dtype) -> None:
    """Everything beside the weights: the base's configuration, the adapter's tokenizer, card and metrics."""
    name = str(dtype).removeprefix("torch.")
    config: dict[str, Any] = json.loads((base / "config.json").read_text())
    config.pop("torch_dtype", None)
    written = output / "config.json"
    if not written.exists() or json.loads(written.read_text())["model_type"] == config["model_type"]:
        written.write_text(json.dumps(config | {"dtype": name}, indent=2) + "\n")
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
    folder = Path(sys.argv[1])
    dtype = HALVES[json.loads((folder / "merge.json").read_text())["dtype"]]
    found: dict[str, Any] = {}
    try:
        merge(folder / "base", folder / "start", folder / "output", dtype)
    except UserError as error:
        found = {"error": {"code": error.code, "message": error.message, "param": error.param}}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
