"""A mapping: which columns hold what, where detection cannot know.

    {"prompt": "Review: {text}\\n", "chosen": "better", "rejected": "worse"}
    {"prompt": "question", "completion": "answer", "label": {"column": "stars", "desirable": [4, 5]}}

It makes a record of the fields that a format has; everything after it is as if the file had been written so.
"""

import re
from typing import Annotated, Any, Self

import orjson
from pydantic import ConfigDict, Field, StringConstraints, model_validator

from app.datasets.reader import DatasetError
from app.strict import Strict, inconsistent

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")

Source = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
"""A column's name, or a template in which `{column}` stands for its text; `{{` is a brace, a dot leads into objects."""


class Label(Strict):
    """A column whose values say whether an answer is good."""

    column: Source
    desirable: Annotated[
        list[
            Annotated[str, StringConstraints(max_length=1024, pattern=r"^[^\x00]*$")]
            | Annotated[int, Field(ge=-(2**53), le=2**53)]
            | float
            | bool
        ],
        Field(min_length=1, max_length=100),
    ]
    """The values that mean a good answer; all others mean a bad one."""


class Mapping(Strict):
    """What to read each field from. Fields that are not named are not read."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"prompt": "{title}\n\n{post}", "chosen": "best_answer", "rejected": "other"}}
    )

    prompt: Source | None = None
    system: Source | None = None
    chosen: Source | None = None
    rejected: Source | None = None
    completion: Source | None = None
    label: Source | Label | None = None
    responses: Source | Annotated[list[Source], Field(min_length=2, max_length=64)] | None = None
    """A column with a list, or several columns."""
    scores: Source | Annotated[list[Source], Field(min_length=2, max_length=64)] | None = None
    ranks: Source | Annotated[list[Source], Field(min_length=2, max_length=64)] | None = None
    messages: Source | None = None
    conversations: Source | None = None
    tools: Source | None = None
    text: Source | None = None
    input: Source | None = None
    output_1: Source | None = None
    output_2: Source | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.sources:
            raise inconsistent("prompt", "A mapping names at least one field")
        return self

    @property
    def sources(self) -> dict[str, Any]:
        """The fields that are named."""
        return {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}

    def apply(self, record: dict[str, object], line: int) -> dict[str, object]:
        """The record of the named fields. Raises `DatasetError` for a column that is not there."""
        return {field: _value(record, source, line) for field, source in self.sources.items()}


def _value(record: dict[str, object], source: Any, line: int) -> object:
    if isinstance(source, Label):
        return _column(record, source.column, line) in source.desirable
    if isinstance(source, list):
        return [_value(record, part, line) for part in source]
    if "{" not in source and "}" not in source:
        return _column(record, source, line)

    def fill(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        value = _column(record, match[1], line)
        if value is None:
            return ""
        return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()

    return _PLACE.sub(fill, source)


def _column(record: dict[str, object], name: str, line: int) -> object:
    if name in record:
        return record[name]
    value: object = record
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            have = ", ".join(sorted(map(str, record)))[:300]
            raise DatasetError(line, name, f"is named by the mapping and not there; the row has: {have}")
        value = value[part]
    return value
