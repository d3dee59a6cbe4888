"""Adapters as PEFT writes them."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def make_adapter(base: Path, folder: Path, **options: Any) -> None:
    """Write a LoRA adapter with random weights into `folder`, as PEFT writes it."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=9, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    adapter_config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config | {"base_model_name_or_path": str(base)}))
    (folder / "README.md").write_text("library_name: peft\n")
