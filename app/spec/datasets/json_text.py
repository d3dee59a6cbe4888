"""Parse JSON of bounded size. Integers are exact; NaN and the infinities become null."""

import json
import re
from itertools import islice

import orjson

from app.spec.datasets import limits
from app.spec.datasets.errors import DatasetError

_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*+"|[,\[{]', re.DOTALL)
_LONG_NUMBER = re.compile(rb"[:,\[] *-?\d{17}")
"""Matches an integer that may need more than 64 bits."""


def null(_name: str) -> None:
    """The value for NaN and the infinities, which Python writes although JSON does not have them."""
    return


def loads(text: str | bytes) -> object:
    """The value of a JSON text. Raises `ValueError` if it is not JSON or holds a lone surrogate."""
    try:
        value: object = json.loads(text, parse_constant=null)
        require_unicode(value)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    return value


def require_unicode(value: object) -> None:
    """Raise `ValueError` if a string in `value` holds a lone surrogate, which UTF-8 cannot encode."""
    json.dumps(value, ensure_ascii=False).encode()


def parse(line: int, raw: bytes) -> object:
    """The value of the JSON text `raw`. Integers are exact; NaN and the infinities become null.

    Raises `DatasetError` with `line` if it is not valid JSON or has too many values.
    """
    if too_many_values(raw):
        raise DatasetError(line, None, f"the record has more than {limits.MAX_VALUES} values")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if b"NaN" in raw or b"Infinity" in raw:
            return _python_json(line, raw, f"not valid JSON: {error.msg} at column {error.colno}")
        raise DatasetError(line, None, _not_json(raw, error)) from error
    if b'"name"' in raw and _LONG_NUMBER.search(raw):
        # orjson turns an integer of more than 64 bits into a float, but arguments of tool calls must stay exact. A tool
        # call always has a key 'name'.
        return _python_json(line, raw, "not valid JSON")
    return value


def _not_json(raw: bytes, error: json.JSONDecodeError) -> str:
    """The reason why `raw` is not JSON: its encoding, or the parser's `error`."""
    try:
        raw.decode()
    except UnicodeDecodeError as unicode_error:
        return f"not valid UTF-8 ({unicode_error.reason}): save the file as UTF-8; it may be Windows-1252 or Latin-1"
    return f"not valid JSON: {error.msg} at column {error.colno}"


def _python_json(line: int, raw: bytes, problem: str) -> object:
    """Parse with the slower standard library. A failure is reported as `problem`."""
    try:
        return loads(raw)
    except ValueError as error:
        raise DatasetError(line, None, problem) from error


def too_many_values(raw: bytes) -> bool:
    """Whether a JSON text may hold more than `limits.MAX_VALUES` values. It counts commas and opening brackets."""
    if len(raw) <= limits.MAX_VALUES:
        return False
    marks = (match for match in _VALUE.finditer(raw) if raw[match.start()] != 0x22)  # 0x22: a string, skipped whole
    return sum(1 for _ in islice(marks, limits.MAX_VALUES + 1)) > limits.MAX_VALUES
