"""Ranks that work together are alike: the same programs, and the same rows. Those that differ are refused."""

from collections.abc import Iterable, Mapping

import torch
import transformers

from worker.trainer.dataset import Rows
from worker.trainer.errors import UserError
from worker.trainer.ranks import Ranks
from worker.trainer.reference import ENGINE_VERSION


def require_alike(ranks: Ranks, parts: Mapping[str, str] | None = None) -> None:
    """Raise `UserError` unless all `ranks` have the same versions, and the same text of each of `parts`."""
    versions = {
        "version of the engine": f"{ENGINE_VERSION}",
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
    }
    for name, text in (versions | dict(parts or {})).items():
        texts = ranks.gather(text)
        if len(set(texts)) > 1:
            message = f"The ranks of this job differ in the {name}: {', '.join(dict.fromkeys(texts))}."
            raise UserError("ranks_differ", message, "resources")


def require_same_rows(ranks: Ranks, rows: Iterable[Rows]) -> None:
    """Raise `UserError` unless all machines have read the same `rows`. Each has its own copy of the tokenizer."""
    if ranks.gather(ranks.local_rank).count(0) > 1:
        require_alike(ranks, {"rows of its files": " ".join(part.digest() for part in rows)})
