"""The base models that this worker can serve: subfolders of `DPO_MODELS_DIR`, and hub ids that it may download.

This module reads only configuration files and the headers of weight files. Only the trainer loads torch.
"""

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import structlog

from app.models.repository import HUB_NAME
from app.settings import Settings
from app.spec.json_types import JsonObject
from worker import hub
from worker.hub import ModelUnavailable
from worker.model_files import (
    INDEX,
    SINGLE_FILE,
    config_of,
    context_length,
    prequantized,
    text_config,
    weight_files,
    why_no_weights,
)
from worker.waiting import Check, always_wanted

log = structlog.get_logger(__name__)

MAX_DEPTH = 3
"""Maximum number of folder levels below the models folder at which a model may lie."""


@dataclass(frozen=True)
class LocalModel:
    """A model in the models folder."""

    name: str
    folder: Path
    revision: str
    """A fingerprint of its files."""
    details: JsonObject
    """The properties that the API needs, as `describe` writes them."""


class BaseModels:
    """Finds base models by name. No name can refer to a folder outside the models folder."""

    def __init__(self, settings: Settings) -> None:
        self.root, self.home = settings.models_dir, settings.home
        self.patterns = settings.hub_models
        self._ignored: set[Path] = set()

    def folders(self) -> dict[str, Path]:
        """The subfolders with a configuration, safetensors weights and a tokenizer, by their path below the root."""
        folders = {}
        for depth in range(1, MAX_DEPTH + 1):
            for config in sorted(self.root.glob("*/" * depth + "config.json")):
                folder = config.parent
                if not folder.resolve().is_relative_to(self.root.resolve()):
                    self._ignore(folder, "it is a link to a place outside the models folder")
                elif not ((folder / INDEX).exists() or (folder / SINGLE_FILE).exists()):
                    self._ignore(folder, why_no_weights(folder))
                elif not (folder / "tokenizer.json").exists():
                    self._ignore(folder, "it has no tokenizer.json")
                else:
                    folders[folder.relative_to(self.root).as_posix()] = folder
        return folders

    def _ignore(self, folder: Path, reason: str) -> None:
        """Log once that `folder` is ignored."""
        if folder not in self._ignored:
            log.warning("model ignored", folder=str(folder), reason=reason)
            self._ignored.add(folder)

    def local(self) -> list[LocalModel]:
        """The models of the models folder with their descriptions. A folder that cannot be read is left out."""
        models = []
        for name, folder in self.folders().items():
            try:
                models.append(describe(name, folder))
            except (OSError, ValueError, AttributeError, TypeError) as error:  # half copied, or damaged
                self._ignore(folder, f"its files cannot be read: {error}")
        return models

    def served(self) -> list[str]:
        """The names and patterns of all base models whose jobs this worker can claim."""
        return [*self.folders(), *self.patterns]

    def locate(self, name: str, check: Check = always_wanted) -> tuple[Path, str | None]:
        """(folder, hub revision) of a base model. An allowed hub id is downloaded first.

        The revision is None for a model of the models folder. Raises `ModelUnavailable`, and what `check` raises while
        the model is downloaded.
        """
        folder = self.folders().get(name)
        if folder is not None:
            return folder, None
        if HUB_NAME.fullmatch(name) and any(fnmatchcase(name, pattern) for pattern in self.patterns):
            folder = hub.download(name, self.home, check)
            return folder, folder.name
        raise ModelUnavailable(f"The base model '{name}' is not in the models folder {self.root}.")


def describe(name: str, folder: Path) -> LocalModel:
    """Describe a model of the models folder. Reads its configuration and the headers of its weights.

    Raises `OSError`, `ValueError`, `AttributeError` or `TypeError` if the files are damaged.
    """
    config, weights = config_of(folder), weight_files(folder)
    if not config.get("model_type"):
        raise ValueError("config.json names no model_type")
    text, method = text_config(config), prequantized(config)
    details = {
        "architecture": (config.get("architectures") or [None])[0],
        "context_length": context_length(config),
        "vocabulary_size": text.get("vocab_size"),
        "bytes": sum(path.stat().st_size for path in weights),
        "chat_template": has_chat_template(folder),
        "prequantized": method,
        "tied": bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        "shape": None if method is not None else _shape(text, weights),
    }
    return LocalModel(name, folder, fingerprint(folder), details)


def fingerprint(folder: Path) -> str:
    """A hash of the configuration and of each weight file's name, size and first MiB. It need not read gigabytes.

    Raises `OSError` or `ValueError` if files are missing.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1024 * 1024))
    return digest.hexdigest()[:16]


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in `folder` has a chat template: as a file of its own or in its configuration."""
    settings = folder / "tokenizer_config.json"
    has_own_file = (folder / "chat_template.jinja").exists() or (folder / "chat_templates").exists()
    return has_own_file or (settings.exists() and bool(json.loads(settings.read_text()).get("chat_template")))


LAYER = re.compile(r"\.\d+\.")
"""The number of a layer inside the name of a tensor."""


def _shape(config: JsonObject, weights: list[Path]) -> JsonObject | None:
    """The sizes that memory use depends on, from the headers of the weight files; None if some are unknown.

    `linears` lists [name, rows, columns, count] of the linear layers. `others` counts all other parameters. `cached`
    counts the keys and values of a token in all layers, as if all of them had full attention.
    """
    linears: Counter[tuple[str, int, int]] = Counter()
    others = 0
    for path in weights:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            shape = tensor["shape"]
            # Experts are neither quantised nor adapted, so they do not count as linear layers.
            if LAYER.search(f".{name}") and name.endswith(".weight") and len(shape) == 2 and ".experts." not in name:
                linears[(name.split(".")[-2], shape[0], shape[1])] += 1
            else:
                others += math.prod(shape)
    hidden = config.get("hidden_size") or config.get("n_embd") or config.get("d_model")
    layers = config.get("num_hidden_layers") or config.get("n_layer") or config.get("n_layers")
    if not hidden or not layers or not linears:
        return None
    heads = config.get("num_attention_heads") or config.get("n_head") or config.get("n_heads") or 1
    width = config.get("head_dim") or hidden // heads
    return {
        "hidden": hidden,
        "layers": layers,
        "cached": 2 * layers * width * (config.get("num_key_value_heads") or heads),
        "vocabulary": config.get("vocab_size") or 0,
        "linears": [[*key, count] for key, count in sorted(linears.items())],
        "others": others,
    }
