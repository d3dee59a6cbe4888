"""A model's tokenizer: loaded, and handed on as its makers wrote it.

transformers writes names of classes of its own version for a tokenizer. Whatever is made of a base model therefore
carries the base's own files, unchanged but for what the artifact is about.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from worker.model_files import TEMPLATES, TOKENIZER_FILES
from worker.trainer.errors import UserError

Tokenizer = Any


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`. Raises `UserError` for one that this engine cannot use."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if not tokenizer.is_fast:
        raise UserError("unsupported_model", "The model has no fast tokenizer, which gives character offsets.", "model")
    if tokenizer.eos_token_id is None:
        raise UserError("unsupported_model", "The model's tokenizer has no end-of-sequence token.", "model")
    return tokenizer


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Put the tokenizer's files of the model in `base` into `folder`, as they are."""
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)
    if (base / TEMPLATES).exists():
        shutil.copytree(base / TEMPLATES, folder / TEMPLATES, dirs_exist_ok=True)


def write_ends(base: Path, folder: Path, ends: Sequence[int]) -> None:
    """Write the `generation_config.json` of the model in `base` into `folder`, with `ends` as what ends a text.

    The base's own ends stay behind them. A base without such a file says what its configuration says.
    """
    config = json.loads((base / "config.json").read_text())
    known = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    path = base / "generation_config.json"
    settings: dict[str, Any] = json.loads(path.read_text()) if path.exists() else known
    own = settings.get("eos_token_id")
    found = list(dict.fromkeys([*ends, *(own if isinstance(own, list) else [own] if own is not None else [])]))
    settings["eos_token_id"] = found[0] if len(found) == 1 else found
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def padding_token(tokenizer: Tokenizer, ends: Iterable[int], size: int) -> str:
    """A token that can pad texts of which the last one matters: none of `ends`, and below `size`.

    The tokenizer's own, or another of its special tokens; else one that no text holds by its name: the last that begins
    with a space, which vocabularies write as another character.
    """
    forbidden = {*ends, tokenizer.eos_token_id}
    special = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token]
    special += [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    ordinary = sorted(tokenizer.get_vocab().items(), key=lambda entry: -entry[1])
    named = [token for token, _ in ordinary if len(token) > 1 and token[0] in "Ġ▁"]
    for token in [*special, *named, *(token for token, _ in ordinary)]:
        if token is not None:
            number = tokenizer.convert_tokens_to_ids(token)
            if number is not None and number not in forbidden and number < size:
                return str(token)
    raise UserError("unsupported_model", "The tokenizer has no token that could pad a text.", "model")
