"""Layer names: those in a loaded model, and those in the checkpoint's files, which servers use."""

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from app.spec.json_types import JsonObject
from worker.model_files import weight_files

PREFIX, DOWN = "base_model.model.", ".lora_A.weight"
"""PEFT's beginning of all tensor names of an adapter, and its ending of the names of LoRA's A matrices."""
FOR_SERVERS = "vllm"
"""Subfolder of an artifact for the adapter under the checkpoint's names, if these differ from the model's."""


@dataclass(frozen=True)
class WeightPlace:
    """The module of a weight in a file. `transposed`: the weight is [inputs, outputs], as in GPT-2."""

    module: str
    transposed: bool


def places(base: Path, modules: Collection[str]) -> dict[str, WeightPlace]:
    """The weights of `modules`, by their names in the base's files.

    transformers' own rules map the names. A weight that transformers converts, for example joins with others, is left
    out.
    """
    model = meta_model(base)
    # A renaming keeps a tensor of the file as it is. A converter joins or splits tensors.
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    weights, weight_places = model.state_dict(), dict[str, WeightPlace]()
    for path in weight_files(base):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, weights)
                module = renamed.removesuffix(".weight")
                if converter is None and module in modules and renamed.endswith(".weight"):
                    weight_places[name] = WeightPlace(module, isinstance(model.get_submodule(module), Conv1D))
    return weight_places


def write_for_servers(base: Path, folder: Path) -> None:
    """Write a second copy of the adapter in `folder` into a subfolder, with the names of the base's files.

    PEFT needs the names of the loaded model, and vLLM needs those of the files. If they are the same, no copy is
    written.
    """
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = {name.removeprefix(PREFIX).removesuffix(DOWN) for name in tensors if name.endswith(DOWN)}
    names = {place.module: name.removesuffix(".weight") for name, place in places(base, modules).items()}
    if names.keys() != modules or all(module == name for module, name in names.items()):
        return
    renamed = {}  # PREFIX + the layer's name in the files + `.lora_…` -> tensor
    for name, tensor in tensors.items():
        module = next(candidate for candidate in modules if name.startswith(f"{PREFIX}{candidate}.lora_"))
        renamed[f"{PREFIX}{names[module]}{name.removeprefix(PREFIX + module)}"] = tensor
    servers_folder = folder / FOR_SERVERS
    servers_folder.mkdir(exist_ok=True)
    save_file(renamed, servers_folder / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(folder / "adapter_config.json", servers_folder / "adapter_config.json")
    settings: JsonObject = json.loads((servers_folder / "adapter_config.json").read_text())
    settings["target_modules"] = sorted({name.rpartition(".")[2] for name in names.values()})
    (servers_folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def meta_model(base: Path) -> PreTrainedModel:
    """The model in `base`, built from its configuration on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
