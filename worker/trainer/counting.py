"""Statistics of a dataset in a model's tokens.

They cover lengths, what would be cut, which rows cannot be trained on, and samples of rows.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer

from app.spec.datasets.check import examples
from app.spec.datasets.errors import DatasetError
from app.spec.datasets.example import Example, Kind
from app.spec.datasets.mapping import Mapping
from app.spec.datasets.pairs import PairRule
from app.spec.datasets.rendering import Rendering, today
from app.spec.datasets.report import Lengths
from app.spec.json_types import JsonObject
from worker.model_files import folder_at
from worker.trainer import data
from worker.trainer.data import Recipe, Row, Tally, Whole
from worker.trainer.errors import UserError
from worker.trainer.rendering import Renderer
from worker.trainer.tokenizer import load_tokenizer

SAMPLED_ROWS = 10_000
"""Most examples that are counted, by default."""
COUNTED_ANSWERS = 5
"""Most answers of an example that are counted. K answers make K (K − 1) / 2 pairs."""
SHOWN = 3
"""Number of rows in the report's samples."""
SHOWN_CHARACTERS = 4000
"""Length at which each text of a sample is cut."""
PERCENTILES = (50, 90, 95, 99)
CANDIDATES = tuple(1 << k for k in range(8, 18))
"""Values of `max_length` for which the report says how many rows they cut."""


def count(path: Path, tokenizer: Tokenizer, recipe: Recipe, kept: int, sample: int = SAMPLED_ROWS) -> JsonObject:
    """Token lengths before cutting, the cuts of each `max_length`, and the first rows as the model sees them.

    `kept` is the number of examples in the file. Every k-th example is counted, so that at most `sample` are. Some
    answers of a long ranked list stand for all of its pairs.
    Raises `UserError` for an example that the template refuses.
    """
    step = max(1, math.ceil(kept / sample))
    tally, renderer = Tally(), Renderer(tokenizer, recipe.rendering)
    measured: list[_Measured] = []
    samples: list[JsonObject] = []
    lines: set[int] = set()
    rows = tokens = scored = 0.0
    longest = merging_prompts = sampled_rows = 0
    weights: dict[int, float] = {}  # by line: the rows that each counted row stands for
    with path.open("rb") as file:
        counted = _every_nth(examples(file, recipe.mapping), step)
        if recipe.need == Kind.PREFERENCE and recipe.pairs.takes_all:
            counted = _with_fewer_answers(counted, weights)
        for whole in data.whole_rows(counted, renderer, recipe, tally):
            fitted = [row for row in data.cut(whole, recipe, tally) if row.learnable]
            lines.add(whole.row.line)
            measured.append(_Measured.of(whole))
            merging_prompts += bool(whole.rest)
            for row in fitted:
                weight = weights.get(row.line, 1.0)
                rows, tokens, sampled_rows = rows + weight, tokens + weight * row.tokens, sampled_rows + 1
                scored += weight * sum(sum(response.scored) for response in row.responses)
                longest = max(longest, row.tokens)
                if len(samples) < SHOWN:
                    samples.append(_sample(row, tokenizer))
    # The counts of the sample are scaled to the whole file.
    counted_examples = max(1, math.ceil(kept / step))
    return {
        "sampled_rows": sampled_rows,
        "rows": round(rows * kept / counted_examples),
        "examples": round(len(lines) * kept / counted_examples),
        "lengths": _lengths(measured, pairs=recipe.need in (Kind.PREFERENCE, Kind.RANKED)),
        "tokens_per_row": tokens / max(1.0, rows),
        "longest_row": longest,
        "scored_tokens_per_row": scored / max(1.0, rows),
        "truncated_share": (tally.rows + tally.long) / max(1, len(measured)),
        "cut_by": _cut_by(measured),
        "refused": [
            {"reason": reason, "rows": rows, "detail": tally.details[reason]}
            for reason, rows in sorted(tally.refused.items())
        ],
        "control_text": tally.control_text,
        "templated": tally.templated,
        "samples": samples,
        "warnings": list(_warnings(tally, renderer, measured, merging_prompts, recipe)),
    }


class _Measured:
    """Token counts of a row before cutting: its prompt and each answer. `raw`: plain text without a prompt."""

    def __init__(self, prompt: int, answers: list[int], raw: bool) -> None:
        self.prompt, self.answers, self.raw = prompt, answers, raw

    @classmethod
    def of(cls, whole: Whole) -> "_Measured":
        return cls(len(whole.row.prompt), [len(response.ids) for response in whole.row.responses], whole.raw)

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest answer. `max_length` bounds this number."""
        return self.prompt + max(self.answers)


def _lengths(measured: Sequence[_Measured], *, pairs: bool) -> JsonObject:
    """Histogram and percentiles of each part of the rows."""
    sides = {"prompt": [row.prompt for row in measured]}
    if pairs:
        sides["chosen"] = [row.answers[0] for row in measured]
        sides["rejected"] = [row.answers[-1] for row in measured if len(row.answers) > 1]
    else:
        sides["answer"] = [row.answers[0] for row in measured]
    sides["whole"] = [row.length for row in measured]
    return {name: _distribution(lengths) for name, lengths in sides.items()}


def _distribution(lengths: list[int]) -> JsonObject:
    """A histogram and percentiles. `p95` is the length that 95 percent of the rows do not exceed."""
    histogram, ordered = Lengths(), sorted(lengths)
    for length in ordered:
        histogram.add(length)
    percentiles = {
        f"p{percent}": ordered[math.ceil(percent / 100 * len(ordered)) - 1] if ordered else 0 for percent in PERCENTILES
    }
    return histogram.as_json() | {"percentiles": percentiles}


def _cut_by(measured: Sequence[_Measured]) -> list[JsonObject]:
    """The cuts of each `max_length`, up to the first that cuts nothing.

    `longer`: rows that are longer, which `drop` leaves out. `prompts_cut` and `answers_cut`: rows whose prompt or
    answer `keep_end` and `keep_start` cut.
    """
    bounded = [row for row in measured if not row.raw]
    report = []
    for max_length in CANDIDATES:
        longer = [row for row in bounded if row.length > max_length]
        rooms = [(row, data.prompt_room(row.prompt, max(row.answers), max_length)) for row in longer]
        prompts = sum(room < row.prompt for row, room in rooms)
        answers = sum(max(row.answers) > max_length - room for row, room in rooms)
        report.append({"max_length": max_length, "longer": len(longer), "prompts_cut": prompts, "answers_cut": answers})
        if not longer:
            break
    return report


def _warnings(
    tally: Tally, renderer: Renderer, measured: Sequence[_Measured], merging_prompts: int, recipe: Recipe
) -> Iterator[str]:
    for reason, rows in sorted(tally.refused.items()):
        yield f"{rows} rows cannot be trained on ({reason}). {tally.details[reason]}"
    if tally.templated:
        yield (
            f"{tally.templated} prompts already have the form of a chat template. They are used as they are. "
            "'chat_template': true applies the model's template to them too."
        )
    if tally.control_text:
        yield f"{tally.control_text} rows hold text that looks like a control token. It is trained as text."
    if merging_prompts:
        yield (
            f"{merging_prompts} prompts end in a character, mostly a space, that merges with the answer's first token. "
            "Training and evaluations here begin the answer before it. Another server gets the whole prompt and does "
            'not. A mapping moves it to the answer: {"prompt": "{question}\\n\\nAnswer:", "completion": " {answer}"}.'
        )
    if renderer.never_ends:
        yield "The chat template writes no end token after an answer. The model cannot learn to stop. See 'append_eos'."
    longer = sum(row.length > recipe.max_length and not row.raw for row in measured)
    if longer > 0.05 * len(measured):
        yield (
            f"{longer} of {len(measured)} rows are longer than {recipe.max_length} tokens; 'cut_by' shows other bounds."
        )


def _every_nth(all_examples: Iterator[Example], step: int) -> Iterator[Example]:
    """Every `step`-th example."""
    return (example for number, example in enumerate(all_examples) if number % step == 0)


def _with_fewer_answers(all_examples: Iterator[Example], weights: dict[int, float]) -> Iterator[Example]:
    """Ranked examples with `COUNTED_ANSWERS` answers at most, from the best to the worst.

    `weights` gets, by line, how many pairs each pair of a shortened example stands for.
    """
    for example in all_examples:
        answers, most = example.responses, COUNTED_ANSWERS
        if len(answers) > most:
            weights[example.line] = len(answers) * (len(answers) - 1) / (most * (most - 1))
            example = example.with_responses(tuple(answers[k * (len(answers) - 1) // (most - 1)] for k in range(most)))
        yield example


def _sample(row: Row, tokenizer: Tokenizer) -> JsonObject:
    """A row as text, for the report's samples. `scored` holds the scored tokens of each response."""

    def text(ids: list[int] | tuple[int, ...]) -> str:
        decoded: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return decoded[:SHOWN_CHARACTERS]

    return {
        "line": row.line,
        "prompt": text(row.prompt),
        "responses": [text(response.ids) for response in row.responses],
        "scored": [
            text([token for token, flag in zip(response.ids, response.scored, strict=True) if flag])
            for response in row.responses
        ],
        "tokens": row.tokens,
    }


def count_folder(folder: Path) -> list[JsonObject]:
    """The counts that `tokens.json` in `folder` requests. A dataset that cannot be counted gets an `error`."""
    requests = json.loads((folder / "tokens.json").read_text())
    try:
        tokenizer = load_tokenizer(folder_at(folder / "model"))
    except UserError as error:
        return [_error_json(error)] * len(requests)
    return [_counted(request, tokenizer) for request in requests]


def _counted(request: JsonObject, tokenizer: Tokenizer) -> JsonObject:
    """The count of one dataset, or its `error`."""
    settings = request["recipe"]
    mapping = None if settings["mapping"] is None else Mapping.model_validate(settings["mapping"])
    rendering = Rendering(**{"date": today()} | settings.get("rendering", {}))
    recipe = Recipe(
        Kind(settings["need"]), settings["max_length"], settings["loss_on"], mapping, rendering,
        settings.get("truncation", "keep_end"), PairRule(**settings.get("pairs", {})),
    )  # fmt: skip
    try:
        return count(Path(request["dataset"]), tokenizer, recipe, request["rows"], request.get("sample", SAMPLED_ROWS))
    except UserError as error:
        return _error_json(error)
    except DatasetError as error:
        return {"error": {"code": "invalid_file", "message": str(error), "param": None}}


def _error_json(error: UserError) -> JsonObject:
    return {"error": {"code": error.code, "message": error.message, "param": error.param}}
