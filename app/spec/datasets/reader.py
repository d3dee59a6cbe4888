"""Read the records of a file one at a time, each with its line number.

The file may be JSON Lines, a JSON array (alone or as a member of an object), CSV, TSV or Parquet. In Parquet, rows are
counted in place of lines. `unpack` handles compression and encodings.
"""

import json
import re
from collections.abc import Iterator
from typing import IO

import orjson

from app.spec.datasets import json_text, limits, tables, unpack
from app.spec.datasets.errors import DatasetError

WRAPPERS = ("data", "rows", "examples", "items", "records", "instances", "train", "dataset")
"""Keys under which an object may hold the array of rows."""
_SCALAR = rb'(?:"[^"\\]*"|[-+.\deE]+|true|false|null)'
_WRAPPER_START = re.compile(
    rb'\{(?:\s*"[^"\\]*"\s*:\s*'
    + _SCALAR
    + rb'\s*,)*\s*"(?:'
    + b"|".join(map(str.encode, WRAPPERS))
    + rb')"\s*:\s*(?=\[)'
)
"""Matches an object from its start to the array of rows. Only scalar members may precede the array."""

Record = dict[str, object]


def records(file: IO[bytes]) -> Iterator[tuple[int, Record]]:
    """(line, record) of every record of `file`. The file must be seekable; it is read from its start.

    Raises `DatasetError` for a damaged or unsupported file, and for a record that is not an object.
    """
    file.seek(0)
    magic = file.read(4)
    file.seek(0)
    return tables.parquet(file) if magic == b"PAR1" else _text_records(unpack.as_plain_utf8(file))


def _text_records(file: IO[bytes]) -> Iterator[tuple[int, Record]]:
    """The records of a UTF-8 file. Its first character tells JSON Lines, an array and a table apart."""
    first = file.read(3)
    if first == b"\xef\xbb\xbf":  # a byte order mark
        first = b""
    head = first.lstrip()
    line = 1 + first[: len(first) - len(head)].count(b"\n")
    while not head:
        chunk = file.read(limits.CHUNK)
        if not chunk:
            return
        head = chunk.lstrip()
        line += chunk[: len(chunk) - len(head)].count(b"\n")
    if head[:1] == b"[":
        yield from _array(head, line, file)
    elif head[:1] == b"{":
        head += file.read(limits.CHUNK)
        wrapper = _WRAPPER_START.match(head)
        if wrapper is None:
            yield from _parsed(_lines(head, line, file))
        else:
            array = head[wrapper.end() :]
            yield from _array(array, line + wrapper[0].count(b"\n"), file, wrapper[0])
    else:
        head += file.readline(limits.MAX_RECORD_BYTES)
        delimiter = tables.delimiter(head)
        if delimiter is None:  # not JSON either: the JSON parser reports where
            yield from _parsed(_lines(head, line, file))
        else:
            yield from tables.table(head, line, file, delimiter)


def _lines(head: bytes, line: int, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(line, text) of every line that is not blank."""
    rest = head
    while chunk := file.read(limits.CHUNK):
        texts = (rest + chunk).split(b"\n")
        rest = texts.pop()
        if len(texts[0] if texts else rest) > limits.MAX_RECORD_BYTES:
            break
        for text in texts:
            if text and not text.isspace():
                yield line, text
            line += 1
    if len(rest) > limits.MAX_RECORD_BYTES or chunk:
        raise DatasetError(line, None, f"the record is larger than {limits.MAX_RECORD_BYTES} bytes")
    for text in rest.split(b"\n"):  # several lines if the whole file was in `head`
        if text and not text.isspace():
            yield line, text
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
"""An error in this many last characters may be due to a number, an escape or a word such as `-Infinity` that is cut."""
_DECODER = json.JSONDecoder(parse_constant=json_text.null)
_BLANKS = re.compile(r"[ \t\n\r]*+")


def _array(head: bytes, line: int, file: IO[bytes], wrapper_start: bytes = b"") -> Iterator[tuple[int, Record]]:
    """The elements of the JSON array that begins in `head`, parsed one by one.

    `wrapper_start`: the text of the object around the array, up to the array. Python's decoder parses the elements
    because, unlike orjson, it returns where an element ends.
    """
    source = _JsonSource(head[1:], file)
    first = True
    while True:
        line += source.skip_blanks().count("\n")
        character = source.peek()
        if character == "":
            raise DatasetError(line, None, CUT_OFF)
        if character == "]" and first:
            break
        if character in ",]":
            raise DatasetError(line, None, "the array has a comma with nothing before it")
        start, first = line, False
        value, text = source.value(start)
        line += text.count("\n")
        yield start, _object(start, value)
        line += source.skip_blanks().count("\n")
        character = source.peek()
        if character == "":
            raise DatasetError(line, None, CUT_OFF)
        if character == "]":
            break
        if character != ",":
            raise DatasetError(line, None, "the array's elements must be separated by commas")
        source.advance()
        line += source.skip_blanks().count("\n")
        if source.peek() == "]":
            break  # a trailing comma is accepted
    source.advance()
    rest = source.rest()
    if not wrapper_start and rest.strip():
        raise DatasetError(line, None, "there is more text after the end of the array")
    if wrapper_start:
        try:
            orjson.loads(wrapper_start + b"[]" + rest.encode())
        except orjson.JSONDecodeError as error:
            raise DatasetError(line, None, f"not valid JSON after the rows: {error.msg}") from error


class _JsonSource:
    """A UTF-8 file from which one JSON value at a time is parsed. Only one value needs to fit into memory."""

    def __init__(self, head: bytes, file: IO[bytes]) -> None:
        self._file, self._undecoded = file, b""
        self._text, self._at, self._ended = "", 0, False
        self._line = 1
        self._add(head)

    def _add(self, raw: bytes) -> None:
        """Decode and append `raw`. The bytes of a character that is cut at its end wait for the next call."""
        raw, self._undecoded = self._undecoded + raw, b""
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            if len(raw) - error.start > 3 or self._ended:
                reason = f"not valid UTF-8 ({error.reason}): save the file as UTF-8"
                raise DatasetError(self._line, None, reason) from error
            text, self._undecoded = raw[: error.start].decode(), raw[error.start :]
        self._text = self._text[self._at :] + text
        self._at = 0

    def _more(self) -> bool:
        """Read one more chunk. False at the end of the file."""
        raw = self._file.read(limits.CHUNK)
        if not raw:
            if self._undecoded and not self._ended:
                self._ended = True
                self._add(b"")
            self._ended = True
            return False
        self._add(raw)
        return True

    def skip_blanks(self) -> str:
        """Skip white space and return it."""
        skipped = ""
        while True:
            match = _BLANKS.match(self._text, self._at)
            assert match is not None
            skipped += match[0]
            self._at = match.end()
            if self._at < len(self._text) or not self._more():
                return skipped

    def peek(self) -> str:
        """The next character; empty at the end of the file."""
        return self._text[self._at : self._at + 1]

    def advance(self) -> None:
        """Skip the next character."""
        self._at += 1

    def value(self, line: int) -> tuple[object, str]:
        """Parse the JSON value that begins here. Return it and its text. Raises `DatasetError` with `line`."""
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
            except (ValueError, RecursionError) as error:  # thousands of digits or of brackets
                raise DatasetError(line, None, "not valid JSON: nested too deep, or a number too long") from error
            else:
                if end < len(self._text) or not self._more():
                    text, self._at = self._text[self._at : end], end
                    self._require_bounded(text, line)
                    return value, text

    def _require_bounded(self, text: str, line: int) -> None:
        """Refuse the text of a value that is too large, has too many values, or holds a lone surrogate."""
        if len(text) > limits.MAX_VALUES:
            raw = text.encode()
            if len(raw) > limits.MAX_RECORD_BYTES:
                raise DatasetError(line, None, f"the record is larger than {limits.MAX_RECORD_BYTES} bytes")
            if json_text.too_many_values(raw):
                raise DatasetError(line, None, f"the record has more than {limits.MAX_VALUES} values")
        if "\\ud" in text or "\\uD" in text:
            json_text.parse(line, text.encode())  # raises for a lone surrogate

    def rest(self) -> str:
        """The rest of the file, up to about `MAX_RECORD_BYTES` characters."""
        while len(self._text) - self._at <= limits.MAX_RECORD_BYTES and self._more():
            pass
        return self._text[self._at :]


def _json_type(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
