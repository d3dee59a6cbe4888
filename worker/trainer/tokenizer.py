"""Load a model's tokenizer."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from worker.trainer.events import UserError

Tokenizer = Any


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`. Raises `UserError` for one that this engine cannot use."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if not tokenizer.is_fast:
        raise UserError("unsupported_model", "The model has no fast tokenizer, which gives character offsets.", "model")
    if tokenizer.eos_token_id is None:
        raise UserError("unsupported_model", "The model's tokenizer has no end-of-sequence token.", "model")
    return tokenizer
