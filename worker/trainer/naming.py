"""Names that the layers of a loaded model have in its checkpoint's files, which servers go by."""

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from worker.model_files import weight_files

PREFIX, DOWN = "base_model.model.", ".lora_A.weight"
FOR_SERVERS = "vllm"
"""The folder of an artifact with its adapter under the checkpoint's names, where those are others."""


@dataclass(frozen=True)
class WeightPlace:
    """Where a weight of a file goes: its module's name, and whether it is [inputs, outputs], as GPT-2's."""

    module: str
    transposed: bool


def places(base: Path, modules: Collection[str]) -> dict[str, WeightPlace]:
    """By their names in the base's files, the weights that go to `modules` as they are, by transformers' own rules."""
    model = without_weights(base)
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    weights, found = model.state_dict(), dict[str, WeightPlace]()
    for path in weight_files(base):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, weights)
                module = renamed.removesuffix(".weight")
                if converter is None and module in modules and renamed.endswith(".weight"):
                    found[name] = WeightPlace(module, isinstance(model.get_submodule(module), Conv1D))
    return found


def write_for_servers(base: Path, folder: Path) -> None:
    """Put the adapter in `folder` once more into a folder in it, under the names that the base's files have.

    peft wants the names of the loaded model, vLLM those of the files. Where they are the same, nothing is written.
    """
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = {name.removeprefix(PREFIX).removesuffix(DOWN) for name in tensors if name.endswith(DOWN)}
    names = {place.module: name.removesuffix(".weight") for name, place in places(base, modules).items()}
    if names.keys() != modules or all(module == name for module, name in names.items()):
        return
    renamed = {}
    for name, tensor in tensors.items():
        module = next(one for one in modules if name.startswith(f"{PREFIX}{one}.lora_"))
        renamed[f"{PREFIX}{names[module]}{name.removeprefix(PREFIX + module)}"] = tensor
    place = folder / FOR_SERVERS
    place.mkdir(exist_ok=True)
    save_file(renamed, place / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(folder / "adapter_config.json", place / "adapter_config.json")
    settings: dict[str, Any] = json.loads((place / "adapter_config.json").read_text())
    settings["target_modules"] = sorted({name.rpartition(".")[2] for name in names.values()})
    (place / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def without_weights(base: Path) -> Any:
    """The model in `base` as its configuration says, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
