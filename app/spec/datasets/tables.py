"""Tables: CSV and TSV, whose first row names the columns, and Parquet."""

import csv
import io
from collections.abc import Iterator
from typing import IO, Any

from app.spec.datasets import json_text, limits
from app.spec.datasets.columns import FIELDS, plain_name
from app.spec.datasets.errors import DatasetError
from app.spec.datasets.unpack import refuse_bomb

PARQUET_ROWS = 16
"""Rows that are in memory at a time: a few bytes of Parquet can stand for megabytes in each."""
STRUCTURED = {
    "messages", "conversations", "conversation_a", "conversation_b", "responses", "answers", "ranks", "scores",
    "completions", "tools", "history",
}  # fmt: skip
"""Columns whose cells are JSON where they look like it."""

Record = dict[str, object]


def delimiter(head: bytes) -> str | None:
    """What separates the columns of a table that begins with `head`; None where it is not one.

    A table of one column has no separator: it is one where the column has a name that formats know.
    """
    header = head.split(b"\n", 1)[0]
    if b"\t" in header:
        return "\t"
    found = next((mark for mark in (",", ";") if mark.encode() in header), None)
    if found is None and plain_name(header.strip(b'\xef\xbb\xbf\r "').decode(errors="replace")) in FIELDS:
        return ","
    return found


def table(head: bytes, line: int, file: IO[bytes], delimiter: str) -> Iterator[tuple[int, Record]]:
    """The rows of a CSV or TSV file that begins with `head`, with the lines on which they begin."""
    csv.field_size_limit(limits.MAX_RECORD_BYTES)
    source = _Lines(head, line, file)
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
            if len(row) > limits.MAX_VALUES:
                raise DatasetError(start, None, f"the header has more than {limits.MAX_VALUES} columns")
            columns = [name.strip() for name in row]
            named = [name for name in columns if name]
            if len(set(named)) < len(named):
                raise DatasetError(start, None, "the header names a column twice")
        elif len(row) == len(columns):
            yield start, {name: _cell(name, value, start) for name, value in zip(columns, row, strict=True) if name}
        elif row:
            raise DatasetError(start, None, f"has {len(row)} columns, the header {len(columns)}")


class _Lines:
    """The lines of a file as text, of bounded length. `line` is the number of the next one."""

    def __init__(self, head: bytes, line: int, file: IO[bytes]) -> None:
        self.line, self.file = line, file
        self._ahead = io.BytesIO(head)

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._ahead.readline()
        if not line.endswith(b"\n"):
            line += self.file.readline(limits.MAX_RECORD_BYTES + 1)
        if not line:
            raise StopIteration
        if len(line) > limits.MAX_RECORD_BYTES:
            raise DatasetError(self.line, None, f"the record is larger than {limits.MAX_RECORD_BYTES} bytes")
        try:
            decoded = line.decode()
        except UnicodeDecodeError as error:
            reason = f"not valid UTF-8 ({error.reason}): save the file as UTF-8; it may be Windows-1252 or Latin-1"
            raise DatasetError(self.line, None, reason) from error
        self.line += 1
        return decoded


def _cell(name: str, value: str, line: int) -> object:
    """A cell: text, or JSON where it holds messages or the column holds lists. An answer may be JSON itself."""
    structured = plain_name(name) in STRUCTURED
    if not value.startswith(("[", "{") if structured else ("[{", '{"')):
        return value
    try:
        found = json_text.parse(line, value.encode(errors="surrogatepass"))
    except DatasetError as error:
        if "values" in error.reason:
            raise DatasetError(line, name, f"holds more than {limits.MAX_VALUES} values") from error
        return value
    return found if structured or _messages(found) else value


def _messages(found: object) -> bool:
    """Whether a JSON value is a message, or a list of them, and not an answer that happens to be JSON."""
    turns = found if isinstance(found, list) else [found]
    return bool(turns) and all(
        isinstance(turn, dict)
        and (
            ("role" in turn and not turn.keys().isdisjoint(("content", "tool_calls")))
            or {"from", "value"} <= turn.keys()
        )
        for turn in turns
    )


def parquet(file: IO[bytes]) -> Iterator[tuple[int, Record]]:
    """The rows of a Parquet file, numbered from 1."""
    import pyarrow
    from pyarrow import parquet

    number = unpacked = 0
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
            coded = any(pyarrow.types.is_dictionary(column.type) for column in batch.columns)
            large = coded or batch.nbytes > 2 * limits.MAX_RECORD_BYTES
            for part in (batch.slice(k, 1) for k in range(batch.num_rows)) if large else (batch,):
                counted = large or batch.nbytes > limits.MAX_VALUES
                unpacked += 0 if counted else part.nbytes
                for record, held, length in _plain_rows(part, count=counted):
                    number += 1
                    if length > limits.MAX_RECORD_BYTES:
                        raise DatasetError(number, None, f"the record is larger than {limits.MAX_RECORD_BYTES} bytes")
                    if held > limits.MAX_VALUES:
                        raise DatasetError(number, None, f"the record has more than {limits.MAX_VALUES} values")
                    unpacked += length
                    refuse_bomb(unpacked, size)
                    yield number, record
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError) as error:
        raise DatasetError(number + 1, None, f"the Parquet file cannot be read: {error}") from error


def _plain_rows(batch: Any, *, count: bool) -> Iterator[tuple[Record, int, int]]:
    """The rows of an Arrow batch as JSON would have them; with `count`, how many values each holds, at all depths, and
    how many characters and bytes.
    """
    columns = [_pylist(column) for column in batch.columns]
    for values in zip(*columns, strict=True) if columns else [()] * batch.num_rows:
        held, length = _measure(values) if count else (0, 0)
        yield dict(zip(batch.schema.names, values, strict=True)), held, length


def _pylist(column: Any) -> list[Any]:
    """The values of an Arrow column. In structs a null stands for a member that is not there, since all rows of a
    column have the same members: it is left out. NaN is what tables have for null.
    """
    import pyarrow

    values: list[Any] = column.to_pylist(maps_as_pydicts="lossy")
    if pyarrow.types.is_nested(column.type):
        return [_cleaned(value) for value in values]
    if pyarrow.types.is_floating(column.type):
        return [None if value != value else value for value in values]
    if pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type):
        return [_decoded(value) for value in values]
    return values


def _cleaned(value: Any) -> Any:
    kind = type(value)
    if kind is str:
        return value
    if kind is dict:
        return {name: _cleaned(item) for name, item in value.items() if item is not None}
    if kind is list:
        return [_cleaned(item) for item in value]
    return None if value != value else value


def _decoded(value: bytes | None) -> Any:
    """Text that was written as bytes."""
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _measure(value: Any) -> tuple[int, int]:
    """(values at all depths, characters and bytes of texts)."""
    if isinstance(value, str | bytes):
        return 1, len(value)
    if isinstance(value, dict | list | tuple):
        parts = [_measure(item) for item in (value.values() if isinstance(value, dict) else value)]
        return 1 + sum(held for held, _ in parts), sum(length for _, length in parts)
    return 1, 0
