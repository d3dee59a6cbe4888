"""`python -m worker.trainer.tokens FOLDER`: what a dataset is in tokens of a model. A folder in, a line of JSON out.

FOLDER holds `dataset`, `model/` (of which the tokenizer is read) and `tokens.json`: `recipe` {need, max_length,
loss_on, mapping}, `rows` (kept by the check).
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.datasets.check import Lengths, examples
from app.datasets.example import Example, Kind
from app.datasets.mapping import Mapping
from app.datasets.reader import DatasetError
from worker.trainer.data import Recipe, Row, Tokenizer, Truncation, rows
from worker.trainer.events import UserError

SAMPLED_ROWS = 10_000
SHOWN = 5
SHOWN_CHARACTERS = 4000


def count(path: Path, tokenizer: Tokenizer, recipe: Recipe, kept: int) -> dict[str, Any]:
    """Lengths in tokens, what `max_length` cuts, and the first rows as the model sees them.

    Every k-th example is looked at, so that at most 10,000 are. Raises `UserError` where the chat template refuses one.
    """
    every = max(1, math.ceil(kept / SAMPLED_ROWS))
    cut, seen, tokens, scored, longest = Truncation(), 0, 0, 0, 0
    lengths = {name: Lengths() for name in ("prompt", "chosen", "rejected")}
    samples: list[dict[str, Any]] = []
    lines: set[int] = set()
    with path.open("rb") as file:
        for row in rows(_every(examples(file, recipe.mapping), every), tokenizer, recipe, cut):
            seen += 1
            lines.add(row.line)
            tokens, scored = tokens + row.tokens, scored + sum(sum(one.scored) for one in row.responses)
            longest = max(longest, row.tokens)
            lengths["prompt"].add(len(row.prompt))
            lengths["chosen"].add(len(row.responses[0].ids))
            if len(row.responses) > 1:
                lengths["rejected"].add(len(row.responses[-1].ids))
            if len(samples) < SHOWN:
                samples.append(_shown(row, tokenizer))
    if recipe.need in (Kind.SUPERVISED, Kind.LABELLED):
        lengths = {"prompt": lengths["prompt"], "answer": lengths["chosen"]}
    return {
        "sampled_rows": seen,
        "rows": round(seen * kept / max(1, math.ceil(kept / every))),
        "examples": round(len(lines) * kept / max(1, math.ceil(kept / every))),
        "lengths": {name: found.as_json() for name, found in lengths.items()},
        "tokens_per_row": tokens / max(1, seen),
        "longest_row": longest,
        "scored_tokens_per_row": scored / max(1, seen),
        "truncated_share": cut.rows / max(1, seen + cut.lost),
        "samples": samples,
    }


def _every(found: Iterator[Example], step: int) -> Iterator[Example]:
    return (example for number, example in enumerate(found) if number % step == 0)


def _shown(row: Row, tokenizer: Tokenizer) -> dict[str, Any]:
    def text(ids: list[int] | tuple[int, ...]) -> str:
        written: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return written[:SHOWN_CHARACTERS]

    return {
        "line": row.line,
        "prompt": text(row.prompt),
        "responses": [text(response.ids) for response in row.responses],
        "scored": [
            text([token for token, flag in zip(one.ids, one.scored, strict=True) if flag]) for one in row.responses
        ],
        "tokens": row.tokens,
    }


def main() -> int:
    # transformers would load torch, which takes most of the time of a small file, and no tokenizer needs it.
    sys.modules["torch"] = None  # type: ignore[assignment]
    from worker.trainer.tokenizer import load_tokenizer

    folder = Path(sys.argv[1])
    asked = json.loads((folder / "tokens.json").read_text())
    recipe = asked["recipe"]
    mapping = None if recipe["mapping"] is None else Mapping.model_validate(recipe["mapping"])
    tokenizer = load_tokenizer(folder / "model")
    wanted = Recipe(Kind(recipe["need"]), recipe["max_length"], recipe["loss_on"], mapping)
    try:
        found = count(folder / "dataset", tokenizer, wanted, asked["rows"])
    except UserError as error:
        found = {"error": {"code": error.code, "message": error.message, "param": error.param}}
    except DatasetError as error:
        found = {"error": {"code": "invalid_file", "message": str(error), "param": None}}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
