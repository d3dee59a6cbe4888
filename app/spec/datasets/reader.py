"""Records of a file, one at a time, each with its line number, whatever the file is.

JSON Lines, a JSON array, alone or as a member of an object, CSV or TSV; or Parquet, whose rows are counted in place of
lines. What it is packed in is `unpack`'s.
"""

import json
import re
from collections.abc import Iterator
from typing import IO

import orjson

from app.spec.datasets import json_text, limits, tables, unpack
from app.spec.datasets.errors import DatasetError

WRAPPERS = ("data", "rows", "examples", "items", "records", "instances", "train", "dataset")
"""Names under which an object may hold the rows."""
_SCALAR = rb'(?:"[^"\\]*"|[-+.\deE]+|true|false|null)'
_WRAPPED = re.compile(
    rb'\{(?:\s*"[^"\\]*"\s*:\s*'
    + _SCALAR
    + rb'\s*,)*\s*"(?:'
    + b"|".join(map(str.encode, WRAPPERS))
    + rb')"\s*:\s*(?=\[)'
)

Record = dict[str, object]


def records(file: IO[bytes]) -> Iterator[tuple[int, Record]]:
    """(line, object) of every record of `file`, which must be seekable; it is read from its start.

    Raises `DatasetError` for bytes that are not what they seem to be, and for records that are not objects.
    """
    file.seek(0)
    magic = file.read(4)
    file.seek(0)
    return tables.parquet(file) if magic == b"PAR1" else _text_records(unpack.plain(file))


def _text_records(file: IO[bytes]) -> Iterator[tuple[int, Record]]:
    first = file.read(3)
    if first == b"\xef\xbb\xbf":  # a byte order mark
        first = b""
    head = first.lstrip()
    line = 1 + first[: len(first) - len(head)].count(b"\n")
    while not head:
        more = file.read(limits.CHUNK)
        if not more:
            return
        head = more.lstrip()
        line += more[: len(more) - len(head)].count(b"\n")
    if head[:1] == b"[":
        yield from _array(head, line, file)
    elif head[:1] == b"{":
        head += file.read(limits.CHUNK)
        wrapped = _WRAPPED.match(head)
        if wrapped is None:
            yield from _parsed(_lines(head, line, file))
        else:
            inside = head[wrapped.end() :]
            yield from _array(inside, line + wrapped[0].count(b"\n"), file, wrapped[0])
    else:
        head += file.readline(limits.MAX_RECORD_BYTES)
        delimiter = tables.delimiter(head)
        if delimiter is None:  # not JSON either: its parser says where
            yield from _parsed(_lines(head, line, file))
        else:
            yield from tables.table(head, line, file, delimiter)


def _lines(head: bytes, line: int, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    rest = head
    while chunk := file.read(limits.CHUNK):
        parts = (rest + chunk).split(b"\n")
        rest = parts.pop()
        if len(parts[0] if parts else rest) > limits.MAX_RECORD_BYTES:
            break
        for part in parts:
            if part and not part.isspace():
                yield line, part
            line += 1
    if len(rest) > limits.MAX_RECORD_BYTES or chunk:
        raise DatasetError(line, None, f"the record is larger than {limits.MAX_RECORD_BYTES} bytes")
    for part in rest.split(b"\n"):  # there are several where the file is no longer than its head
        if part and not part.isspace():
            yield line, part
        line += 1


def _parsed(raw: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, Record]]:
    for line, record in raw:
        yield line, _object(line, json_text.parse(line, record))


def _object(line: int, value: object) -> Record:
    if not isinstance(value, dict):
        raise DatasetError(line, None, f"a record must be a JSON object, not {_json_type(value)}")
    return value


CUT_OFF = "the JSON array is cut off before its closing bracket"
_LITERAL = 16
"""Characters at the end of a text that may be the beginning of a number, an escape or a word such as `-Infinity`."""
_DECODER = json.JSONDecoder(parse_constant=json_text.null)
_BLANKS = re.compile(r"[ \t\n\r]*+")


def _array(head: bytes, line: int, file: IO[bytes], before: bytes = b"") -> Iterator[tuple[int, Record]]:
    """The elements of a JSON array that begins `head`, parsed one by one. `before` is the object around it, if any.

    Python's decoder says where an element ends, which orjson does not: so none is looked at twice.
    """
    source = _Characters(head[1:], file)
    first = True
    while True:
        line += source.skip_blanks().count("\n")
        mark = source.peek()
        if mark == "":
            raise DatasetError(line, None, CUT_OFF)
        if mark == "]" and first:
            break
        if mark in ",]":
            raise DatasetError(line, None, "the array has a comma with nothing before it")
        at, first = line, False
        value, text = source.value(at)
        line += text.count("\n")
        yield at, _object(at, value)
        line += source.skip_blanks().count("\n")
        mark = source.peek()
        if mark == "":
            raise DatasetError(line, None, CUT_OFF)
        if mark == "]":
            break
        if mark != ",":
            raise DatasetError(line, None, "the array's elements must be separated by commas")
        source.advance()
        line += source.skip_blanks().count("\n")
        if source.peek() == "]":
            break  # a comma before the bracket, which people write
    source.advance()
    rest = source.rest()
    if not before and rest.strip():
        raise DatasetError(line, None, "there is more text after the end of the array")
    if before:
        try:
            orjson.loads(before + b"[]" + rest.encode())
        except orjson.JSONDecodeError as error:
            raise DatasetError(line, None, f"not valid JSON after the rows: {error.msg}") from error


class _Characters:
    """A UTF-8 file as text, of which one value at a time is needed whole."""

    def __init__(self, head: bytes, file: IO[bytes]) -> None:
        self._file, self._waiting = file, b""
        self._text, self._at, self._ended = "", 0, False
        self._line = 1
        self._add(head)

    def _add(self, raw: bytes) -> None:
        """Append `raw` as far as its last whole character."""
        raw, self._waiting = self._waiting + raw, b""
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            if len(raw) - error.start > 3 or self._ended:
                reason = f"not valid UTF-8 ({error.reason}): save the file as UTF-8"
                raise DatasetError(self._line, None, reason) from error
            text, self._waiting = raw[: error.start].decode(), raw[error.start :]
        self._text = self._text[self._at :] + text
        self._at = 0

    def _more(self) -> bool:
        raw = self._file.read(limits.CHUNK)
        if not raw:
            if self._waiting and not self._ended:
                self._ended = True
                self._add(b"")
            self._ended = True
            return False
        self._add(raw)
        return True

    def skip_blanks(self) -> str:
        """Pass over white space, and return it."""
        skipped = ""
        while True:
            match = _BLANKS.match(self._text, self._at)
            assert match is not None
            skipped += match[0]
            self._at = match.end()
            if self._at < len(self._text) or not self._more():
                return skipped

    def peek(self) -> str:
        """The next character; none at the end."""
        return self._text[self._at : self._at + 1]

    def advance(self) -> None:
        """Pass over the next character."""
        self._at += 1

    def value(self, line: int) -> tuple[object, str]:
        """The JSON value that begins here, and its text. Raises `DatasetError` with `line`."""
        self._line = line
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LITERAL
                if len(self._text) - self._at > limits.MAX_RECORD_BYTES:
                    raise DatasetError(
                        line, None, f"the record is larger than {limits.MAX_RECORD_BYTES} bytes"
                    ) from error
                if not cut_off or not self._more():
                    raise DatasetError(line, None, CUT_OFF if cut_off else f"not valid JSON: {error.msg}") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, or a thousand brackets
                raise DatasetError(line, None, "not valid JSON: nested too deep, or a number too long") from error
            else:
                if end < len(self._text) or not self._more():
                    text, self._at = self._text[self._at : end], end
                    self._require(text, line)
                    return value, text

    def _require(self, text: str, line: int) -> None:
        if len(text) > limits.MAX_VALUES:
            raw = text.encode()
            if len(raw) > limits.MAX_RECORD_BYTES:
                raise DatasetError(line, None, f"the record is larger than {limits.MAX_RECORD_BYTES} bytes")
            if json_text.too_many_values(raw):
                raise DatasetError(line, None, f"the record has more than {limits.MAX_VALUES} values")
        if "\\ud" in text or "\\uD" in text:
            json_text.parse(line, text.encode())  # whether all surrogates are in pairs

    def rest(self) -> str:
        """What follows, of bounded length."""
        while len(self._text) - self._at <= limits.MAX_RECORD_BYTES and self._more():
            pass
        return self._text[self._at :]


def _json_type(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
