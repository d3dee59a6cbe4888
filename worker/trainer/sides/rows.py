"""The rows that an evaluation or a labelling uses, and the fields of its items that identify them."""

from collections.abc import Collection
from hashlib import sha256
from typing import TypeVar

from app.spec.datasets.check import numbered_examples
from app.spec.datasets.example import Example
from app.spec.json_types import JsonObject
from worker.trainer.data import prompt_text
from worker.trainer.sides.run import SidesRun

Item = JsonObject
"""A line of `items.jsonl`. `line` is the line of the data. Items of the same prompt share a `prompt_number`."""
Key = TypeVar("Key", int, tuple[int, int])


def examples_of(run: SidesRun) -> dict[int, Example]:
    """The drawn rows of the data, by their number in the file."""
    with (run.folder / run.spec.data).open("rb") as file:
        examples = dict(numbered_examples(file, run.spec.mapping))
    return {row: examples[row] for row in sorted(draw_rows(run, examples))}


def draw_rows(run: SidesRun, keys: Collection[Key]) -> set[Key]:
    """A random subset of `keys` with at most `max_rows` of them. The same seed always draws the same ones."""
    spec = run.spec
    if spec.max_rows is None or len(keys) <= spec.max_rows:
        return set(keys)
    ranked = sorted(keys, key=lambda key: sha256(f"{spec.seed} {key}".encode()).digest())
    return set(ranked[: spec.max_rows])


def prompt_numbers(rows: dict[int, Example]) -> dict[int, int]:
    """The number of each row's prompt. Rows with the same prompt share a number."""
    numbers: dict[str, int] = {}
    return {row: numbers.setdefault(prompt_text(example), len(numbers)) for row, example in rows.items()}


def row_fields(example: Example, row: int, prompt_number: int) -> Item:
    """The fields of an item that identify its row."""
    return {"line": example.line, "row": row, "prompt_number": prompt_number, "prompt": prompt_text(example)}
