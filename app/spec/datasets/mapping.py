"""A mapping says which columns hold which fields, for files whose column names do not tell.

    {"prompt": "Review: {text}\\n", "chosen": "better", "rejected": "worse"}
    {"prompt": "question", "completion": "answer", "label": {"column": "stars", "desirable": [4, 5]}}
    {"input": "q", "output_1": "a", "output_2": "b", "label": {"column": "winner", "first": ["A"], "second": ["B"]}}

It turns each row into a record with the fields of a known format. All later steps read this record.
"""

import json
import re
from typing import Annotated, Self

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator

from app.spec.datasets import limits
from app.spec.datasets.columns import plain_name
from app.spec.datasets.errors import DatasetError
from app.spec.datasets.example import Role
from app.spec.datasets.labels import LabelScheme, Meaning, scheme_from_values, value_of
from app.spec.schema_base import Strict, inconsistent

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def _bounded(source: str) -> str:
    """Refuse a template that names too many columns."""
    places = sum(match[1] is not None for match in _PLACEHOLDER.finditer(source))
    if places > limits.MAX_PLACES:
        raise ValueError(f"names {places} columns; a template may name at most {limits.MAX_PLACES}")
    return source


Source = Annotated[
    str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]*$"), AfterValidator(_bounded)
]
"""A column's name, or a template in which `{column}` stands for the column's text and `{{` for a brace.

A dot leads into objects and lists: `summaries.0.text`.
"""

Values = Annotated[
    list[
        Annotated[str, StringConstraints(max_length=1024, pattern=r"^[^\x00]*$")]
        | Annotated[int, Field(ge=-(2**53), le=2**53)]
        | float
        | bool
    ],
    Field(min_length=1, max_length=100),
]
"""Values of a column. They are normalised before they are compared: 4 equals the text "4", and "Yes" equals "yes"."""


class Label(Strict):
    """A column whose values say whether an answer is good, or which of two answers is better."""

    column: Source
    desirable: Values | None = None
    """The values that mean a good answer. Without `undesirable`, all other values mean a bad one."""
    undesirable: Values | None = None
    """The values that mean a bad answer. A row whose value is in neither list is left out and counted."""
    first: Values | None = None
    """The values that mean that `output_1` is better."""
    second: Values | None = None
    """The values that mean that `output_2` is better."""
    tie: Values | None = None
    """The values that mean a tie. Values that are in no list are treated like a tie."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        single, verdict = (self.desirable, self.undesirable), (self.first, self.second, self.tie)
        if any(single) == any(verdict):
            raise inconsistent("label", "A label has either 'desirable' values, or 'first' and 'second' values")
        if any(verdict) and not (self.first and self.second):
            raise inconsistent("label", "A label of two answers needs both 'first' and 'second' values")
        if self.undesirable and not self.desirable:
            raise inconsistent("label.desirable", "A label with 'undesirable' values needs 'desirable' values too")
        listed = [value_of(value) for values in (*single, *verdict) for value in values or []]
        if len(set(listed)) < len(listed):
            raise inconsistent("label", "A value is listed twice")
        return self

    @property
    def compares(self) -> bool:
        """Whether the values are verdicts on two answers."""
        return self.first is not None

    def scheme(self) -> LabelScheme:
        """The meanings of the values."""
        meanings: dict[Meaning, Values | None] = {
            "desirable": self.desirable, "undesirable": self.undesirable, "first": self.first, "second": self.second,
            "tie": self.tie,
        }  # fmt: skip
        others: Meaning = "undesirable" if self.desirable and not self.undesirable else "neither"
        return scheme_from_values(self.column, {name: values for name, values in meanings.items() if values}, others)


class Mapping(Strict):
    """The source of each field. Fields without a source are not read."""

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
    """The meanings of role names that the messages use: `{"customer": "user", "agent": "assistant"}`."""

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if not self.sources and not self.roles:
            raise inconsistent("prompt", "A mapping needs at least one field")
        compares = isinstance(self.label, Label) and self.label.compares
        if compares and not (self.output_1 and self.output_2):
            raise inconsistent("label", "A label with 'first' and 'second' values needs 'output_1' and 'output_2'")
        if isinstance(self.label, Label) and not compares and self.output_1:
            raise inconsistent("label", "With 'output_1' and 'output_2', the label needs 'first' and 'second' values")
        return self

    @property
    def sources(self) -> dict[str, str | Label | list[str]]:
        """The fields that have a source, with their sources."""
        fields = {name: getattr(self, name) for name in type(self).model_fields if name != "roles"}
        return {name: source for name, source in fields.items() if source is not None}

    @property
    def scheme(self) -> LabelScheme | None:
        """The meanings of the label's values, if the mapping lists them."""
        return self.label.scheme() if isinstance(self.label, Label) else None

    def apply(self, record: dict[str, object], line: int) -> dict[str, object]:
        """A record with the mapping's fields, filled from their sources. A mapping of only `roles` changes nothing.

        Raises `DatasetError` if the record lacks a column, or if the new record would be too large.
        """
        sources = self.sources
        if not sources:
            return record
        filling = _Filling(record, line)
        return {field: filling.value(source) for field, source in sources.items()}


class _Filling:
    """Fills the fields of one record. The new record may be as large as a record of a file, and no larger.

    A value that several places use counts each time. It is refused before it is copied.
    """

    def __init__(self, record: dict[str, object], line: int) -> None:
        self.record, self.line, self._room = record, line, limits.MAX_RECORD_BYTES
        self._used = set[int]()
        """The identities of values that a field has as they are."""

    def value(self, source: str | Label | list[str]) -> object:
        """The value of a source: of a column, a template, several columns, or the column of a label."""
        if isinstance(source, Label):
            return self._as_it_is(source.column)
        if isinstance(source, list):
            return [self.value(column) for column in source]
        if "{" not in source and "}" not in source:
            return self._as_it_is(source)
        return self._template(source)

    def _as_it_is(self, name: str) -> object:
        value = _column(self.record, name, self.line)
        if id(value) in self._used and isinstance(value, str | dict | list):
            self._spend(name, _text(value))
        self._used.add(id(value))
        return value

    def _template(self, template: str) -> str:
        pieces, texts, end = list[str](), dict[str, str](), 0
        for match in _PLACEHOLDER.finditer(template):
            pieces.append(template[end : match.start()])
            end, name = match.end(), match[1]
            if name is None:
                pieces.append(match[0][0])
                continue
            if name not in texts:
                texts[name] = _text(_column(self.record, name, self.line))
            self._spend(name, texts[name])
            pieces.append(texts[name])
        return "".join([*pieces, template[end:]])

    def _spend(self, name: str, text: str) -> None:
        self._room -= len(text)
        if self._room < 0:
            reason = f"fills the fields of the mapping with more than {limits.MAX_RECORD_BYTES} characters"
            raise DatasetError(self.line, name, reason)


def _text(value: object) -> str:
    """The text of a column's value."""
    if value is None:
        return ""
    if isinstance(value, bool | int | float | dict | list):
        return json.dumps(value, default=str, ensure_ascii=False, separators=(",", ":"))
    return str(value)


def _column(record: dict[str, object], name: str, line: int) -> object:
    """The value of a column, also by a name that differs in case or spaces, or by a dotted path."""
    if name in record:
        return record[name]
    alike = [column for column in record if plain_name(column) == plain_name(name)]
    if len(alike) == 1:
        return record[alike[0]]
    value: object = record
    for key in name.split("."):
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
            continue
        if not isinstance(value, dict) or key not in value:
            columns = ", ".join(sorted(map(str, record)))[:300]
            raise DatasetError(line, name, f"is named by the mapping, but not in the row; the row has: {columns}")
        value = value[key]
    return value
