"""A mapping: which columns hold what, where detection cannot know.

    {"prompt": "Review: {text}\\n", "chosen": "better", "rejected": "worse"}
    {"prompt": "question", "completion": "answer", "label": {"column": "stars", "desirable": [4, 5]}}
    {"input": "q", "output_1": "a", "output_2": "b", "label": {"column": "winner", "first": ["A"], "second": ["B"]}}

It makes a record of the fields that a format has; everything after it is as if the file had been written so.
"""

import json
import re
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from app.spec.datasets.columns import plain_name
from app.spec.datasets.errors import DatasetError
from app.spec.datasets.example import Role
from app.spec.datasets.labels import Meaning, Scheme, given, value_of
from app.spec.schema_base import Strict, inconsistent

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")

Source = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
"""A column's name, or a template in which `{column}` stands for its text; `{{` is a brace; a dot leads into
objects and lists, `summaries.0.text`."""


Values = Annotated[
    list[
        Annotated[str, StringConstraints(max_length=1024, pattern=r"^[^\x00]*$")]
        | Annotated[int, Field(ge=-(2**53), le=2**53)]
        | float
        | bool
    ],
    Field(min_length=1, max_length=100),
]
"""Values of a column. They are compared by what they say: 4 is also the text "4", "Yes" also "yes"."""


class Label(Strict):
    """A column whose values say whether an answer is good, or which of two is better."""

    column: Source
    desirable: Values | None = None
    """The values that mean a good answer; without `undesirable` all others mean a bad one."""
    undesirable: Values | None = None
    """The values that mean a bad answer; a row with one that is in neither list is left out and counted."""
    first: Values | None = None
    """The values that mean that `output_1` is better."""
    second: Values | None = None
    """The values that mean that `output_2` is better."""
    tie: Values | None = None
    """The values that mean neither. Those that are in no list mean neither too."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        answer, pair = (self.desirable, self.undesirable), (self.first, self.second, self.tie)
        if any(answer) == any(pair):
            raise inconsistent("label", "A label names 'desirable' values, or 'first' and 'second' ones")
        if any(pair) and not (self.first and self.second):
            raise inconsistent("label", "A verdict names the values of 'first' and those of 'second'")
        if self.undesirable and not self.desirable:
            raise inconsistent("label.desirable", "A label names the values that are 'desirable'")
        listed = [value_of(value) for values in (*answer, *pair) for value in values or []]
        if len(set(listed)) < len(listed):
            raise inconsistent("label", "A label names each value once")
        return self

    @property
    def compares(self) -> bool:
        """Whether the values are verdicts on two answers."""
        return self.first is not None

    def scheme(self) -> Scheme:
        """What the values mean."""
        meanings: dict[Meaning, Values | None] = {
            "desirable": self.desirable, "undesirable": self.undesirable, "first": self.first, "second": self.second,
            "tie": self.tie,
        }  # fmt: skip
        others: Meaning = "undesirable" if self.desirable and not self.undesirable else "neither"
        return given(self.column, {name: values for name, values in meanings.items() if values}, others)


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
    roles: Annotated[dict[Annotated[str, StringConstraints(max_length=128)], Role], Field(max_length=64)] | None = None
    """What the messages' own names of roles mean: `{"customer": "user", "agent": "assistant"}`."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.sources and not self.roles:
            raise inconsistent("prompt", "A mapping names at least one field")
        compares = isinstance(self.label, Label) and self.label.compares
        if compares and not (self.output_1 and self.output_2):
            raise inconsistent("label", "A verdict goes with 'output_1' and 'output_2'")
        if isinstance(self.label, Label) and not compares and self.output_1:
            raise inconsistent("label", "With 'output_1' and 'output_2', the label names 'first' and 'second' values")
        return self

    @property
    def sources(self) -> dict[str, Any]:
        """The fields that are named."""
        named = {name: getattr(self, name) for name in type(self).model_fields if name != "roles"}
        return {name: source for name, source in named.items() if source is not None}

    @property
    def scheme(self) -> Scheme | None:
        """What the values of the label mean, where the mapping says it."""
        return self.label.scheme() if isinstance(self.label, Label) else None

    def apply(self, record: dict[str, object], line: int) -> dict[str, object]:
        """The record of the named fields; a mapping of roles alone leaves it as it is.

        Raises `DatasetError` for a column that is not there.
        """
        sources = self.sources
        return {field: _value(record, source, line) for field, source in sources.items()} if sources else record


def _value(record: dict[str, object], source: Any, line: int) -> object:
    if isinstance(source, Label):
        return _column(record, source.column, line)
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
        if isinstance(value, bool | int | float | dict | list):
            return json.dumps(value, default=str, ensure_ascii=False, separators=(",", ":"))
        return str(value)

    return _PLACE.sub(fill, source)


def _column(record: dict[str, object], name: str, line: int) -> object:
    if name in record:
        return record[name]
    alike = [column for column in record if plain_name(column) == plain_name(name)]
    if len(alike) == 1:
        return record[alike[0]]
    value: object = record
    for part in name.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
            continue
        if not isinstance(value, dict) or part not in value:
            have = ", ".join(sorted(map(str, record)))[:300]
            raise DatasetError(line, name, f"is named by the mapping and not there; the row has: {have}")
        value = value[part]
    return value
