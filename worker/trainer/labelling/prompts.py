"""The prompts of a labelling: each different one of the data, once."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import orjson

from app.spec.datasets.check import numbered_examples
from app.spec.datasets.example import Example, ResponseContent
from app.spec.datasets.reader import records
from app.spec.json_types import JsonObject
from app.spec.labelling import MAX_ITEMS
from worker.trainer.data import answer_text, asks, prompt_text
from worker.trainer.errors import UserError
from worker.trainer.labelling.run import LabellingRun
from worker.trainer.sides.completions import MAX_COMPLETIONS
from worker.trainer.sides.rows import draw_rows


@dataclass
class Prompt:
    """A prompt, the answers that the data has to it, and the first row that has it, with all its fields."""

    example: Example
    item: JsonObject
    own: list[ResponseContent] = field(default_factory=list)


def prompts_of(run: LabellingRun) -> dict[int, Prompt]:
    """The drawn prompts, by the number of their first row. Raises `UserError` if there are none.

    Rows with the same prompt are one. If a grader reads the rows, they are one only if all of their fields are equal.
    """
    graded = any(labeller.grader is not None for labeller in run.spec.labellers)
    by_text, prompts = dict[bytes, int](), dict[int, Prompt]()
    for row, example, item in _rows(run):
        if not asks(example):
            continue
        key = orjson.dumps([prompt_text(example), example.tools, item if graded else None], default=str)
        first = by_text.setdefault(key, row)
        if first == row:
            prompts[row] = Prompt(example, item if graded else {})
        if run.spec.own_answers:
            prompts[first].own += example.responses
    drawn = draw_rows(run, prompts.keys())
    if not drawn:
        raise UserError("invalid_file", "No row of the data has a prompt to be answered.", "data")
    found = {row: prompts[row] for row in sorted(drawn)}
    _require_few(run, found)
    return found


def _require_few(run: LabellingRun, prompts: dict[int, Prompt]) -> None:
    """Refuse more prompts or answers than a labeller takes, before anything is sampled or paid. Raises `UserError`."""
    spec = run.spec
    if spec.people is not None and len(prompts) > MAX_ITEMS:
        message = f"{len(prompts)} prompts are too many for people. They take {MAX_ITEMS}: set 'max_rows'."
        raise UserError("invalid_value", message, "max_rows")
    if spec.written * len(prompts) > MAX_COMPLETIONS:
        message = f"{spec.written * len(prompts)} answers exceed the limit of {MAX_COMPLETIONS}. Set 'max_rows'."
        raise UserError("invalid_value", message, "max_rows")
    most, questions = spec.most_answers, 0
    for prompt in prompts.values():
        count = spec.written + len({answer_text(answer).strip() for answer in prompt.own})
        questions += count * (count - 1)
        if count > most:
            message = f"Line {prompt.example.line}: {count} answers are too many. These labellers take {most}."
            raise UserError("invalid_value", message, "own_answers")
    if questions > MAX_COMPLETIONS and any(labeller.asked for labeller in spec.labellers):
        message = f"{questions} questions to a judge exceed the limit of {MAX_COMPLETIONS}. Set 'max_rows'."
        raise UserError("invalid_value", message, "max_rows")


def _rows(run: LabellingRun) -> Iterator[tuple[int, Example, JsonObject]]:
    """(number, example, record) of each row of the data that is kept."""
    path = run.folder / run.spec.data
    with path.open("rb") as file, path.open("rb") as again:
        items = enumerate(records(again))
        for row, example in numbered_examples(file, run.spec.mapping):
            yield row, example, next(record for place, (_, record) in items if place == row)
