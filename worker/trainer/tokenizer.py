"""A model's tokenizer: loading it, and copying it to artifacts as its makers wrote it.

When transformers saves a tokenizer, it writes class names of its own version. Artifacts therefore carry the base's own
files. Only what the artifact itself needs is changed in them.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from app.spec.json_types import JsonObject
from worker.model_files import TEMPLATES, TOKENIZER_FILES
from worker.trainer.errors import UserError


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`. Raises `UserError` if this engine cannot use it."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if not tokenizer.is_fast:
        raise UserError(
            "unsupported_model", "The model has no fast tokenizer. Training needs its character offsets.", "model"
        )
    if tokenizer.eos_token_id is None:
        raise UserError("unsupported_model", "The model's tokenizer has no end-of-sequence token.", "model")
    return tokenizer


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copy the tokenizer's files of the model in `base` to `folder`, unchanged."""
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)
    if (base / TEMPLATES).exists():
        shutil.copytree(base / TEMPLATES, folder / TEMPLATES, dirs_exist_ok=True)


def write_ends(base: Path, folder: Path, ends: Sequence[int]) -> None:
    """Write the `generation_config.json` of the model in `base` into `folder`, with `ends` as its end tokens.

    The base's own end tokens follow them. Without such a file in `base`, the token ids come from its configuration.
    """
    config = json.loads((base / "config.json").read_text())
    token_ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    path = base / "generation_config.json"
    settings: JsonObject = json.loads(path.read_text()) if path.exists() else token_ids
    base_ends = settings.get("eos_token_id")  # a list, a number or None
    base_ends = base_ends if isinstance(base_ends, list) else [base_ends]
    all_ends = [end for end in dict.fromkeys([*ends, *base_ends]) if end is not None]
    settings["eos_token_id"] = all_ends[0] if len(all_ends) == 1 else all_ends
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def padding_token(tokenizer: Tokenizer, ends: Iterable[int], size: int) -> str:
    """A padding token for a model that reads the last token before the padding.

    It is none of `ends`, and its id is below `size`. Preferred are the tokenizer's own padding token and its other
    special tokens. Otherwise it is the last token that begins with a space. Vocabularies write that space as another
    character, so no text contains the token's name.
    """
    forbidden = {*ends, tokenizer.eos_token_id}
    special = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token]
    special += [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    ordinary = sorted(tokenizer.get_vocab().items(), key=lambda entry: -entry[1])
    named = [token for token, _ in ordinary if len(token) > 1 and token[0] in "Ġ▁"]
    for token in [*special, *named, *(token for token, _ in ordinary)]:
        if token is not None:
            token_id = tokenizer.convert_tokens_to_ids(token)
            if token_id is not None and token_id not in forbidden and token_id < size:
                return str(token)
    raise UserError("unsupported_model", "The tokenizer has no token that could pad a text.", "model")
