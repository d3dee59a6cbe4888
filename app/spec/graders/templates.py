"""Templates of graders: `{{item.answer}}` stands for a field of the row, `{{sample.output_text}}` for the answer."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

from app.spec.json_types import JsonObject
from app.spec.schema_base import NO_NUL

_PLACE = re.compile(r"\{\{([^{}]*)\}\}")
MAX_PLACES, MAX_FILLED = 100, 1 << 20
"""The most places of a template, and the most characters of one that is filled."""
SAMPLE = ("output_text", "output_json")
"""The fields of `sample`: the answer as it is, and as JSON."""


class GradingError(Exception):
    """A grader cannot grade this answer. `flag` is one of the flags of OpenAI's contract."""

    def __init__(self, flag: str, message: str) -> None:
        super().__init__(flag, message)  # all arguments, so that the error can be pickled between processes
        self.flag, self.message = flag, message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Sample:
    """An answer of the model."""

    text: str

    @cached_property
    def json(self) -> object:
        """The answer as JSON. Raises `GradingError` if it is none."""
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError):
            raise GradingError("sample_parse_error", "The answer is not valid JSON.") from None


def _known(template: str) -> str:
    """Refuse a place that no row can fill."""
    paths = [path.strip() for path in _PLACE.findall(template)]
    if len(paths) > MAX_PLACES:
        raise ValueError(f"has {len(paths)} places; a template may have {MAX_PLACES}")
    for path in paths:
        namespace, *fields = path.split(".")
        if namespace not in ("item", "sample") or not all(fields) or not fields:
            raise ValueError(f"has '{{{{{path}}}}}'; a place is {{{{item.FIELD}}}} or {{{{sample.output_text}}}}")
        if namespace == "sample" and (fields[0] not in SAMPLE or (fields[0] == "output_text" and len(fields) > 1)):
            raise ValueError(f"has '{{{{{path}}}}}'; a sample has 'output_text' and 'output_json'")
    return template


Template = Annotated[str, StringConstraints(max_length=65_536, pattern=NO_NUL), AfterValidator(_known)]
"""Text in which `{{item.FIELD}}` and `{{sample.output_text}}` are replaced. A dot leads into objects and lists."""


def filled(template: str, sample: Sample, item: JsonObject) -> str:
    """`template` with the values of an answer and its row. Raises `GradingError` for a field that is not there."""
    length = 0

    def text(place: re.Match[str]) -> str:
        nonlocal length
        value = _text(_value(place[1].strip(), sample, item))
        length += len(value)
        if length > MAX_FILLED:
            raise GradingError("truncated_observation_error", f"A text has more than {MAX_FILLED:,} characters.")
        return value

    return _PLACE.sub(text, template)


def _value(path: str, sample: Sample, item: JsonObject) -> object:
    namespace, *fields = path.split(".")
    value: object = item
    if namespace == "sample":
        value, fields = (sample.text if fields[0] == "output_text" else sample.json), fields[1:]
    for field in fields:
        if isinstance(value, Mapping) and field in value:
            value = value[field]
        elif isinstance(value, list) and field.isdecimal() and len(field) < 10 and int(field) < len(value):
            value = value[int(field)]
        else:
            value = None
        if value is None:
            raise GradingError("invalid_variable_error", f"'{{{{{path}}}}}' is not there: no '{field}'.")
    return value


def _text(value: object) -> str:
    """A value as text: a string and a table's date as they are, numbers, lists and objects as JSON."""
    is_json = isinstance(value, bool | int | float | list | dict)
    return json.dumps(value, ensure_ascii=False, default=str) if is_json else str(value)
