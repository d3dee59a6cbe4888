"""Records of a JSON Lines file or a JSON array, plain or gzipped, one at a time, each with its line number."""

import gzip
import re
import zlib
from collections.abc import Iterator
from typing import IO

import orjson

MAX_RECORD_BYTES = 16 * 1024 * 1024
"""A record larger than this is refused before it is in memory."""
_CHUNK = 1024 * 1024
_STRUCTURE = re.compile(rb'["\\{}\[\],\n]')


class DatasetError(Exception):
    """A file that cannot be trained on: where (`line` counts from 1, `field`) and why."""

    def __init__(self, line: int, field: str | None, reason: str) -> None:
        self.line, self.field, self.reason = line, field, reason
        super().__init__(f"Line {line}: " + (f"field '{field}': " if field else "") + reason)


def records(file: IO[bytes]) -> Iterator[tuple[int, dict[str, object]]]:
    """(line, object) of every record of `file`, which must be seekable.

    Raises `DatasetError` for bytes that are not gzip, UTF-8 or JSON, and for records that are not objects.
    """
    try:
        for line, raw in _raw_records(_decompressed(file)):
            yield line, _parse(line, raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DatasetError(1, None, f"the gzip data is damaged or cut off ({error}); upload it again") from error


def _decompressed(file: IO[bytes]) -> IO[bytes]:
    magic = file.read(2)
    file.seek(0)
    return gzip.open(file) if magic == b"\x1f\x8b" else file  # type: ignore[return-value]


def _raw_records(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
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
    if head.startswith(b"["):
        yield from _array(head, line, file)
    else:
        yield from _lines(head, line, file)


def _lines(head: bytes, line: int, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    current = head
    while True:
        if b"\n" in current:
            parts = current.split(b"\n")
            yield from ((line + i, part) for i, part in enumerate(parts[:-1]) if part.strip())
            line, current = line + len(parts) - 1, parts[-1]
        more = file.readline(MAX_RECORD_BYTES + 1 - len(current))
        if not more:
            break
        current += more
        if len(current) > MAX_RECORD_BYTES:
            raise DatasetError(line, None, f"the record is larger than {MAX_RECORD_BYTES} bytes")
    if current.strip():
        yield line, current


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
    try:
        record = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise DatasetError(line, None, f"not valid JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise DatasetError(line, None, f"a record must be a JSON object, not {_json_type(record)}")
    return record


def _json_type(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
