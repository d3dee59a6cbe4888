"""What a dataset is in tokens of a model: how long, what would be cut, what cannot be trained, and how rows look."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from app.spec.datasets.check import examples
from app.spec.datasets.errors import DatasetError
from app.spec.datasets.example import Example, Kind
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.rendering import Rendering, today
from app.spec.datasets.report import Lengths
from worker.trainer import data
from worker.trainer.data import Recipe, Row, Tally, Tokenizer, Whole
from worker.trainer.errors import UserError
from worker.trainer.rendering import Renderer
from worker.trainer.tokenizer import load_tokenizer

SAMPLED_ROWS = 10_000
SHOWN = 3
SHOWN_CHARACTERS = 4000
PERCENTILES = (50, 90, 95, 99)
CANDIDATES = tuple(1 << k for k in range(8, 18))
"""Values of `max_length` for which the report says what each would cut."""


def count(path: Path, tokenizer: Tokenizer, recipe: Recipe, kept: int, sample: int = SAMPLED_ROWS) -> dict[str, Any]:
    """Lengths in tokens before anything is cut, what each `max_length` would cut, and the first rows as the model sees
    them.

    Every k-th example is looked at, so that at most `sample` are. Raises `UserError` for what the template refuses.
    """
    every = max(1, math.ceil(kept / sample))
    tally, renderer = Tally(), Renderer(tokenizer, recipe.rendering)
    found: list[_Measured] = []
    samples: list[dict[str, Any]] = []
    lines: set[int] = set()
    rows = tokens = scored = longest = rests = 0
    with path.open("rb") as file:
        for whole in data.whole_rows(_every(examples(file, recipe.mapping), every), renderer, recipe, tally):
            fitted = [row for row in data.cut(whole, recipe, tally) if row.learnable]
            lines.add(whole.row.line)
            found.append(_Measured.of(whole))
            rests += bool(whole.rest)
            for row in fitted:
                rows, tokens = rows + 1, tokens + row.tokens
                scored += sum(sum(one.scored) for one in row.responses)
                longest = max(longest, row.tokens)
                if len(samples) < SHOWN:
                    samples.append(_shown(row, tokenizer))
    looked_at = max(1, math.ceil(kept / every))
    return {
        "sampled_rows": rows,
        "rows": round(rows * kept / looked_at),
        "examples": round(len(lines) * kept / looked_at),
        "lengths": _lengths(found, pairs=recipe.need in (Kind.PREFERENCE, Kind.RANKED)),
        "tokens_per_row": tokens / max(1, rows),
        "longest_row": longest,
        "scored_tokens_per_row": scored / max(1, rows),
        "truncated_share": (tally.rows + tally.long) / max(1, len(found)),
        "cut_by": _cut_by(found),
        "refused": [
            {"reason": reason, "rows": rows, "detail": tally.details[reason]}
            for reason, rows in sorted(tally.refused.items())
        ],
        "control_text": tally.control_text,
        "templated": tally.templated,
        "samples": samples,
        "warnings": list(_warnings(tally, renderer, found, rests, recipe)),
    }


class _Measured:
    """How long a row is before anything is cut: the prompt, and each answer."""

    def __init__(self, prompt: int, answers: list[int], raw: bool) -> None:
        self.prompt, self.answers, self.raw = prompt, answers, raw

    @classmethod
    def of(cls, whole: Whole) -> "_Measured":
        return cls(len(whole.row.prompt), [len(one.ids) for one in whole.row.responses], whole.raw)

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest answer, which `max_length` bounds."""
        return self.prompt + max(self.answers)


def _lengths(found: Sequence[_Measured], *, pairs: bool) -> dict[str, Any]:
    sides = {"prompt": [one.prompt for one in found]}
    if pairs:
        sides["chosen"] = [one.answers[0] for one in found]
        sides["rejected"] = [one.answers[-1] for one in found if len(one.answers) > 1]
    else:
        sides["answer"] = [one.answers[0] for one in found]
    sides["whole"] = [one.length for one in found]
    return {name: _described(lengths) for name, lengths in sides.items()}


def _described(lengths: list[int]) -> dict[str, Any]:
    """A histogram, and the length that so many percent are no longer than."""
    counted, ordered = Lengths(), sorted(lengths)
    for length in ordered:
        counted.add(length)
    at = {f"p{p}": ordered[math.ceil(p / 100 * len(ordered)) - 1] if ordered else 0 for p in PERCENTILES}
    return counted.as_json() | {"percentiles": at}


def _cut_by(found: Sequence[_Measured]) -> list[dict[str, Any]]:
    """For each `max_length`, up to the first that cuts nothing: how many rows are longer, which `drop` leaves out; and
    in how many a prompt or an answer is cut, by `keep_end` and `keep_start`.
    """
    bounded = [one for one in found if not one.raw]
    made = []
    for most in CANDIDATES:
        longer = [one for one in bounded if one.length > most]
        rooms = [(one, data.prompt_room(one.prompt, max(one.answers), most)) for one in longer]
        prompts = sum(room < one.prompt for one, room in rooms)
        answers = sum(max(one.answers) > most - room for one, room in rooms)
        made.append({"max_length": most, "longer": len(longer), "prompts_cut": prompts, "answers_cut": answers})
        if not longer:
            break
    return made


def _warnings(
    tally: Tally, renderer: Renderer, found: Sequence[_Measured], rests: int, recipe: Recipe
) -> Iterator[str]:
    for reason, rows in sorted(tally.refused.items()):
        yield f"{rows} rows cannot be trained on ({reason}). {tally.details[reason]}"
    if tally.templated:
        yield (
            f"{tally.templated} prompts were written by a chat template already: they are taken as they are. "
            "'chat_template': true wraps them all the same."
        )
    if tally.control_text:
        yield f"{tally.control_text} rows hold text that looks like a control token. It is trained as text."
    if rests:
        yield (
            f"{rests} prompts end in a character, mostly a space, that merges with the answer's first token. Training "
            "and evaluations here begin the answer before it; another server, which is sent the whole prompt, does "
            'not. A mapping moves it to the answer: {"prompt": "{question}\\n\\nAnswer:", "completion": " {answer}"}.'
        )
    if renderer.never_ends:
        yield "The chat template writes no end behind an answer: the model cannot learn to stop. See 'append_eos'."
    cut = sum(one.length > recipe.max_length and not one.raw for one in found)
    if cut > 0.05 * len(found):
        yield f"{cut} of {len(found)} rows are longer than {recipe.max_length} tokens; 'cut_by' shows other bounds."


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


def count_folder(folder: Path) -> list[dict[str, Any]]:
    """The counts that `tokens.json` in `folder` asks for; an `error` for what cannot be counted."""
    wanted = json.loads((folder / "tokens.json").read_text())
    try:
        tokenizer = load_tokenizer(folder / "model")
    except UserError as error:
        return [_told(error)] * len(wanted)
    return [_counted(one, tokenizer) for one in wanted]


def _counted(asked: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    recipe = asked["recipe"]
    mapping = None if recipe["mapping"] is None else Mapping.model_validate(recipe["mapping"])
    rendering = Rendering(**{"date": today()} | recipe.get("rendering", {}))
    wanted = Recipe(
        Kind(recipe["need"]), recipe["max_length"], recipe["loss_on"], mapping, rendering,
        recipe.get("truncation", "keep_end"),
    )  # fmt: skip
    try:
        return count(Path(asked["dataset"]), tokenizer, wanted, asked["rows"], asked.get("sample", SAMPLED_ROWS))
    except UserError as error:
        return _told(error)
    except DatasetError as error:
        return {"error": {"code": "invalid_file", "message": str(error), "param": None}}


def _told(error: UserError) -> dict[str, Any]:
    return {"error": {"code": error.code, "message": error.message, "param": error.param}}
