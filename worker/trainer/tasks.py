"""The prompts of a reinforcement stage, with the rows of their files, which graders read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import orjson
from transformers import PreTrainedTokenizerBase as Tokenizer

from app.spec.datasets.check import examples
from app.spec.datasets.example import Example
from app.spec.datasets.reader import records
from app.spec.json_types import JsonObject
from worker.trainer import data
from worker.trainer.data import Recipe, Row
from worker.trainer.rendering import Renderer
from worker.trainer.sampling import Prompt

KNOWN = 4096
"""Number of rendered prompts that are kept."""


class Task(NamedTuple):
    """A prompt to be answered. `item` is the row of its file, with all its fields."""

    prompt: Prompt
    example: Example
    item: JsonObject


@dataclass(frozen=True)
class Tasks:
    """The tasks of some files, found by the rows of their prompts. `recipe` leaves room for an answer."""

    paths: Sequence[Path]
    tokenizer: Tokenizer
    recipe: Recipe
    _known: dict[tuple[int, int], Task] = field(default_factory=dict)

    def of(self, row: Row) -> Task:
        """The task of `row`. Raises `UserError` for a prompt that cannot be rendered."""
        place = row.file, row.number
        if place not in self._known:
            if len(self._known) == KNOWN:
                self._known.clear()
            fields, item = orjson.loads(self._rows[place])
            example = Example(**fields | {"responses": (), "scores": (), "tools": tuple(fields["tools"])})
            prompt = Prompt(*data.prompt_ids(example, self._renderer, self.recipe))
            self._known[place] = Task(prompt, example, item)
        return self._known[place]

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.recipe.rendering)

    @cached_property
    def _rows(self) -> dict[tuple[int, int], bytes]:
        """The example and the record of each row as JSON, by its file and the number of its record.

        Python's objects would take ten times the memory of the file. Dates and the like become text.
        """
        rows = dict[tuple[int, int], bytes]()
        for number, path in enumerate(self.paths):
            with path.open("rb") as file, path.open("rb") as again:
                items = enumerate(records(again))
                for example in examples(file, self.recipe.mapping):
                    item = next(record for place, (_, record) in items if place == example.number)
                    fields = asdict(example) | {"responses": (), "turns": ()}
                    rows[number, example.number] = orjson.dumps([fields, item], default=str)
        return rows
