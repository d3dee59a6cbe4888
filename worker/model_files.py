"""The files of a model's folder, read without the libraries that would load them."""

import json
from pathlib import Path
from typing import Any

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "tokenizer.model.v3", "sentencepiece.bpe.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt",
    "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATES = "chat_templates"
"""A folder of further templates, by name."""
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
_INSIDE = ("text_config", "language_config", "llm_config", "decoder")
"""Where the configuration of a model that also sees or hears has that of its text."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads, sorted: other copies of the weights may lie beside them.

    Raises `ValueError` where the index names a file that is not there.
    """
    index = folder / INDEX
    if not index.exists():
        return [folder / WHOLE] if (folder / WHOLE).exists() else []
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = next((name for name in names if not (folder / name).exists()), None)
    if missing is not None:
        raise ValueError(f"{missing} is not there, which {INDEX} names")
    return [folder / name for name in names]


def why_no_weights(folder: Path) -> str:
    """The reason to give for a folder without safetensors: it names the files in their place."""
    others = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(kind))
    if not others:
        return f"it has no {WHOLE} and no {INDEX}"
    return f"its weights are in {others[0]}: convert them to safetensors"


def config_of(folder: Path) -> dict[str, Any]:
    """The configuration as it is written."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that is about text."""
    return next((config[name] for name in _INSIDE if isinstance(config.get(name), dict)), config)


def context_length(config: dict[str, Any]) -> int | None:
    """The most tokens that a text may have, whatever the configuration calls it; None where it says nothing."""
    text = text_config(config)
    return next((text[name] for name in _CONTEXT if isinstance(text.get(name), int) and text[name] > 0), None)


def prequantized(config: dict[str, Any]) -> str | None:
    """How the weights on the disk are quantised already (`bnb-4bit`, `gptq`, `mxfp4`); None where they are not."""
    found = config.get("quantization_config") or text_config(config).get("quantization_config")
    if not isinstance(found, dict):
        return None
    method = str(found.get("quant_method") or "").lower()
    if "bitsandbytes" in method or found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bnb-4bit" if found.get("load_in_4bit") else "bnb-8bit"
    return method or "an unknown method"
