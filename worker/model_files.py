"""Read the files of a model's folder without transformers or torch."""

import json
from pathlib import Path

from app.spec.json_types import JsonObject

INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
"""A folder has all weights in one file, or an index of several files."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "tokenizer.model.v3", "sentencepiece.bpe.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt",
    "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATES = "chat_templates"
"""The folder of additional chat templates, by name."""
_LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
_TEXT_PARTS = ("text_config", "language_config", "llm_config", "decoder")
"""Fields that hold the text model's configuration in a multimodal model."""


def point_to(place: Path, folder: Path) -> None:
    """Make `place` stand for a model's folder: a file with its path. Some file systems have no links."""
    place.write_text(str(folder.resolve()))


def folder_at(place: Path) -> Path:
    """The model's folder that `place` is, or that it stands for."""
    return Path(place.read_text()) if place.is_file() else place


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads, sorted. Other copies of the weights are left out.

    The list is empty without safetensors. Raises `ValueError` if a file that the index names does not exist.
    """
    index = folder / INDEX
    if not index.exists():
        return [folder / SINGLE_FILE] if (folder / SINGLE_FILE).exists() else []
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = next((name for name in names if not (folder / name).exists()), None)
    if missing is not None:
        raise ValueError(f"{INDEX} names {missing}, which does not exist")
    return [folder / name for name in names]


def weight_bytes(folder: Path) -> int:
    """The size of the safetensors files that transformers loads."""
    return sum(path.stat().st_size for path in weight_files(folder))


def why_no_weights(folder: Path) -> str:
    """The reason why a folder without safetensors cannot be used. It names a file of another format, if any."""
    other_weights = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(kind))
    if not other_weights:
        return f"it has no {SINGLE_FILE} and no {INDEX}"
    return f"its weights are in {other_weights[0]}: convert them to safetensors"


def config_of(folder: Path) -> JsonObject:
    """The contents of `config.json`."""
    config: JsonObject = json.loads((folder / "config.json").read_text())
    return config


def text_config(config: JsonObject) -> JsonObject:
    """The text model's configuration: a part of a multimodal configuration, else the whole."""
    return next((config[name] for name in _TEXT_PARTS if isinstance(config.get(name), dict)), config)


def context_length(config: JsonObject) -> int | None:
    """The maximum number of tokens of a text; None if the configuration does not give one."""
    text = text_config(config)
    return next((text[name] for name in _LENGTH_FIELDS if isinstance(text.get(name), int) and text[name] > 0), None)


def prequantized(config: JsonObject) -> str | None:
    """The quantisation method of the stored weights (`bnb-4bit`, `gptq`, `mxfp4`); None if they are not quantised."""
    settings = config.get("quantization_config") or text_config(config).get("quantization_config")
    if not isinstance(settings, dict):
        return None
    method = str(settings.get("quant_method") or "").lower()
    if "bitsandbytes" in method or settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bnb-4bit" if settings.get("load_in_4bit") else "bnb-8bit"
    return method or "an unknown method"
