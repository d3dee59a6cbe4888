"""Records of a file, one at a time, each with its line number, whatever the file is.

JSON Lines, a JSON array, CSV or TSV, each plain or gzipped; or Parquet, whose rows are counted in place of lines.
"""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

import orjson

MAX_RECORD_BYTES = 16 * 1024 * 1024
"""A record larger than this is refused before it is in memory."""
MAX_VALUES = 200_000
"""Of a record, at all depths: a value takes far more memory than bytes."""
MAX_RATIO = 200
UNPACKED_BYTES = 64 * 1024 * 1024
"""A file that unpacks to more than this, and to more than `MAX_RATIO` times its size, is refused: it is a bomb."""
PARQUET_ROWS = 16
"""Rows that are in memory at a time: a few bytes of Parquet can stand for megabytes in each."""
_CHUNK = 1024 * 1024
_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*+"|[,\[{]', re.DOTALL)
_STRUCTURE = re.compile(rb'["\\{}\[\],\n]')


class DatasetError(Exception):
    """A file that cannot be trained on: where (`line` counts from 1, `field`) and why."""

    def __init__(self, line: int, field: str | None, reason: str) -> None:
        self.line, self.field, self.reason = line, field, reason
        super().__init__(f"Line {line}: " + (f"field '{field}': " if field else "") + reason)


def records(file: IO[bytes]) -> Iterator[tuple[int, dict[str, object]]]:
    """(line, object) of every record of `file`, which must be seekable.

    Raises `DatasetError` for bytes that are not what they seem to be, and for records that are not objects.
    """
    magic = file.read(4)
    file.seek(0)
    try:
        if magic == b"PAR1":
            yield from _parquet(file)
        else:
            yield from _text_records(io.BufferedReader(_Unpacked(file), _CHUNK) if magic[:2] == b"\x1f\x8b" else file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DatasetError(1, None, f"the gzip data is damaged or cut off ({error}); upload it again") from error


def _refuse_bomb(unpacked: int, packed: int) -> None:
    if unpacked > UNPACKED_BYTES and unpacked > MAX_RATIO * packed:
        raise DatasetError(1, None, f"the file unpacks to more than {MAX_RATIO} times its size")


class _Unpacked(io.RawIOBase):
    """What a gzipped file holds, as long as that is in proportion."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed, self._gzip, self._seen = packed, gzip.GzipFile(fileobj=packed), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._gzip.read1(len(buffer))
        self._seen += len(content)
        _refuse_bomb(self._seen, self._packed.tell())
        buffer[: len(content)] = content
        return len(content)


def _text_records(file: IO[bytes]) -> Iterator[tuple[int, dict[str, object]]]:
    first = file.read(3)
    if first == b"\xef\xbb\xbf":  # a byte order mark
        first = b""
    head = first.lstrip()
    line = 1 + first[: len(first) - len(head)].count(b"\n")
    while not head:
        more = file.read(_CHUNK)
        if not more:
            return
        head = more.lstrip()
        line += more[: len(more) - len(head)].count(b"\n")
    if head[:1] in b"{[":
        raw = _array(head, line, file) if head[:1] == b"[" else _lines(head, line, file)
        for number, record in raw:
            yield number, _parse(number, record)
        return
    head += file.readline(MAX_RECORD_BYTES)
    delimiter = _delimiter(head)
    if delimiter is None:  # not JSON either: its parser says where
        for number, record in _lines(head, line, file):
            yield number, _parse(number, record)
        return
    yield from _table(head, line, file, delimiter)


def _delimiter(head: bytes) -> str | None:
    """What separates the columns of a table that begins with `head`; None where it is not one."""
    header = head.split(b"\n", 1)[0]
    if b"\t" in header:
        return "\t"
    return next((mark for mark in (",", ";") if mark.encode() in header), None)


def _table(head: bytes, line: int, file: IO[bytes], delimiter: str) -> Iterator[tuple[int, dict[str, object]]]:
    """The rows of a CSV or TSV file, whose first row names the columns."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    source = _TextLines(head, line, file)
    rows = csv.reader(source, delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    while True:
        start = source.line
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DatasetError(start, None, f"not valid CSV: {error}") from error
        if row is None:
            return
        if columns is None:
            columns = row
            if len(columns) > MAX_VALUES:
                raise DatasetError(start, None, f"the header has more than {MAX_VALUES} columns")
            if len(set(columns)) < len(columns):
                raise DatasetError(start, None, "the header names a column twice")
        elif len(row) == len(columns):
            yield start, {name: _cell(name, value, start) for name, value in zip(columns, row, strict=True) if name}
        elif row:
            raise DatasetError(start, None, f"has {len(row)} columns, the header {len(columns)}")


class _TextLines:
    """The lines of a file as text, of bounded length. `line` is the number of the next one."""

    def __init__(self, head: bytes, line: int, file: IO[bytes]) -> None:
        self.line, self.file = line, file
        self._ahead = io.BytesIO(head)

    def __iter__(self) -> "_TextLines":
        return self

    def __next__(self) -> str:
        line = self._ahead.readline()
        if not line.endswith(b"\n"):
            line += self.file.readline(MAX_RECORD_BYTES + 1)
        if not line:
            raise StopIteration
        if len(line) > MAX_RECORD_BYTES:
            raise DatasetError(self.line, None, f"the record is larger than {MAX_RECORD_BYTES} bytes")
        try:
            decoded = line.decode()
        except UnicodeDecodeError as error:
            raise DatasetError(self.line, None, f"not valid UTF-8: {error.reason}") from error
        self.line += 1
        return decoded


STRUCTURED = {"messages", "conversations", "responses", "ranks", "scores", "completions", "tools", "history"}


def _cell(name: str, value: str, line: int) -> object:
    """A cell of a table: text, or JSON where a column holds lists or messages. An answer may be JSON itself."""
    if name not in STRUCTURED and not value.startswith(("[{", '{"')):
        return value
    if _values(value.encode(errors="surrogatepass")) > MAX_VALUES:
        raise DatasetError(line, name, f"holds more than {MAX_VALUES} values")
    try:
        found = orjson.loads(value)
    except orjson.JSONDecodeError:
        return value
    first = found[0] if isinstance(found, list) and found else found
    message = isinstance(first, dict) and ("role" in first or "from" in first)
    return found if message or name in STRUCTURED else value


def _parquet(file: IO[bytes]) -> Iterator[tuple[int, dict[str, object]]]:
    import pyarrow
    from pyarrow import parquet

    number = unpacked = 0
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
            coded = any(pyarrow.types.is_dictionary(column.type) for column in batch.columns)
            large = coded or batch.nbytes > 2 * MAX_RECORD_BYTES
            for part in (batch.slice(k, 1) for k in range(batch.num_rows)) if large else (batch,):
                for row in part.to_pylist():
                    number += 1
                    record, held, length = _plain(row)
                    if length > MAX_RECORD_BYTES:
                        raise DatasetError(number, None, f"the record is larger than {MAX_RECORD_BYTES} bytes")
                    if held > MAX_VALUES:
                        raise DatasetError(number, None, f"the record has more than {MAX_VALUES} values")
                    unpacked += length
                    _refuse_bomb(unpacked, size)
                    yield number, record
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError) as error:
        raise DatasetError(number + 1, None, f"the Parquet file cannot be read: {error}") from error


def _plain(row: dict[str, object]) -> tuple[dict[str, object], int, int]:
    """A Parquet row without the nulls that it has in place of fields that are not there; how many values were in it, at
    all depths; and how many characters and bytes.
    """
    values = length = 0

    def cleaned(value: object) -> object:
        nonlocal values, length
        if isinstance(value, dict):
            values += len(value)
            return {name: cleaned(item) for name, item in value.items() if item is not None}
        if isinstance(value, list):
            values += len(value)
            return [cleaned(item) for item in value]
        if isinstance(value, str | bytes):
            length += len(value)
        return value

    found = {name: cleaned(value) for name, value in row.items() if value is not None}
    return found, values + len(row), length


def _lines(head: bytes, line: int, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    rest = head
    while chunk := file.read(_CHUNK):
        parts = (rest + chunk).split(b"\n")
        rest = parts.pop()
        if len(parts[0] if parts else rest) > MAX_RECORD_BYTES:
            break
        for part in parts:
            if part and not part.isspace():
                yield line, part
            line += 1
    if len(rest) > MAX_RECORD_BYTES or chunk:
        raise DatasetError(line, None, f"the record is larger than {MAX_RECORD_BYTES} bytes")
    for part in rest.split(b"\n"):  # there are several where the file is no longer than its head
        if part and not part.isspace():
            yield line, part
        line += 1


def _array(head: bytes, line: int, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The elements of a JSON array, cut at its top-level commas without parsing it whole."""
    buffer, position = head, 1
    depth, in_string = 0, False
    start, start_line = 1, line
    while True:
        match = _STRUCTURE.search(buffer, position)
        if match is None:
            position = len(buffer)
        else:
            token, position = match[0], match.end()
            if token == b"\n":
                line += 1
            elif token == b"\\" and in_string:
                if position == len(buffer):
                    buffer += file.read(_CHUNK)
                position += 1
            elif token == b'"':
                in_string = not in_string
            elif not in_string:
                if token in b"{[":
                    depth += 1
                elif (token == b"]" and depth == 0) or (token == b"," and depth == 0):
                    element = buffer[start : match.start()]
                    stripped = element.lstrip()
                    at = start_line + element[: len(element) - len(stripped)].count(b"\n")
                    if stripped:
                        yield at, stripped
                    elif token == b",":
                        raise DatasetError(at, None, "the array has a comma with nothing before it")
                    if token == b"]":
                        rest = buffer[position:] + file.read(_CHUNK)
                        if rest.strip():
                            raise DatasetError(line, None, "there is more text after the end of the array")
                        return
                    start, start_line = position, line
                elif token in b"}]":
                    depth -= 1
            if match.end() < len(buffer):
                continue
        if position - start > MAX_RECORD_BYTES:
            raise DatasetError(start_line, None, f"the record is larger than {MAX_RECORD_BYTES} bytes")
        more = file.read(_CHUNK)
        if not more:
            raise DatasetError(line, None, "the JSON array is cut off before its closing bracket")
        buffer, position, start = buffer[start:] + more, position - start, 0


def _parse(line: int, raw: bytes) -> dict[str, object]:
    if _values(raw) > MAX_VALUES:
        raise DatasetError(line, None, f"the record has more than {MAX_VALUES} values")
    try:
        record = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise DatasetError(line, None, f"not valid JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise DatasetError(line, None, f"a record must be a JSON object, not {_json_type(record)}")
    return record


def _values(raw: bytes) -> int:
    """How many values a JSON text holds at most, counted to `MAX_VALUES` and one; 0 where it is too short for many."""
    if len(raw) <= MAX_VALUES:
        return 0
    found = (match for match in _VALUE.finditer(raw) if raw[match.start()] != 0x22)  # texts are passed over
    return sum(1 for _ in islice(found, MAX_VALUES + 1))


def _json_type(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
