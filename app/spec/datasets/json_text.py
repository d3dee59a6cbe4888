"""JSON texts of bounded size, in which whole numbers are exact, and NaN and infinities are null."""

import json
import re
from itertools import islice
from typing import Any

import orjson

from app.spec.datasets import limits
from app.spec.datasets.errors import DatasetError

_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*+"|[,\[{]', re.DOTALL)
_LONG_NUMBER = re.compile(rb"[:,\[] *-?\d{17}")
"""A number that may need more than 64 bits: what tools are called with has names around it."""


def null(_name: str) -> None:
    """In the place of NaN and of infinities, which Python writes and JSON has not."""
    return


def loads(text: str | bytes) -> Any:
    """The value of a JSON text. Raises `ValueError` for what is none, or holds text that no encoding has."""
    try:
        found = json.loads(text, parse_constant=null)
        require_unicode(found)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    return found


def require_unicode(value: object) -> None:
    """Raise `ValueError` for half a surrogate pair."""
    json.dumps(value, ensure_ascii=False).encode()


def parse(line: int, raw: bytes) -> object:
    """A JSON text. NaN and infinities, which Python writes and JSON has not, are null; whole numbers are exact.

    Raises `DatasetError`.
    """
    if too_many_values(raw):
        raise DatasetError(line, None, f"the record has more than {limits.MAX_VALUES} values")
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if b"NaN" in raw or b"Infinity" in raw:
            return _python_json(line, raw, f"not valid JSON: {error.msg} at column {error.colno}")
        raise DatasetError(line, None, _not_json(raw, error)) from error
    if b'"name"' in raw and _LONG_NUMBER.search(raw):  # orjson makes a float of what has more than 64 bits
        return _python_json(line, raw, "not valid JSON")
    return found


def _not_json(raw: bytes, error: json.JSONDecodeError) -> str:
    try:
        raw.decode()
    except UnicodeDecodeError as found:
        return f"not valid UTF-8 ({found.reason}): save the file as UTF-8; it may be Windows-1252 or Latin-1"
    return f"not valid JSON: {error.msg} at column {error.colno}"


def _python_json(line: int, raw: bytes, problem: str) -> object:
    try:
        return loads(raw)
    except ValueError as error:
        raise DatasetError(line, None, problem) from error


def too_many_values(raw: bytes) -> bool:
    """Whether a JSON text may hold more than `limits.MAX_VALUES` values."""
    if len(raw) <= limits.MAX_VALUES:
        return False
    found = (match for match in _VALUE.finditer(raw) if raw[match.start()] != 0x22)  # texts are passed over
    return sum(1 for _ in islice(found, limits.MAX_VALUES + 1)) > limits.MAX_VALUES
