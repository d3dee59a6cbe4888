"""Read tables: Parquet, and CSV and TSV with the column names in the first row."""

import csv
import io
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from app.spec.datasets import json_text, limits
from app.spec.datasets.columns import FIELDS, plain_name
from app.spec.datasets.errors import DatasetError
from app.spec.datasets.unpack import refuse_bomb

if TYPE_CHECKING:
    import pyarrow

PARQUET_ROWS = 16
"""Number of rows to read at a time. A row of a few bytes in Parquet can unpack to megabytes."""
STRUCTURED = {
    "messages", "conversations", "conversation_a", "conversation_b", "responses", "answers", "ranks", "scores",
    "completions", "tools", "history",
}  # fmt: skip
"""Columns whose cells are parsed as JSON if they begin with a bracket or brace."""

Record = dict[str, object]


def delimiter(head: bytes) -> str | None:
    """The character that separates the columns of a table that begins with `head`; None if it is no table.

    A table of one column has no separator. It is recognised by a column name that formats know.
    """
    header = head.split(b"\n", 1)[0]
    if b"\t" in header:
        return "\t"
    separator = next((character for character in (",", ";") if character.encode() in header), None)
    if separator is None and plain_name(header.strip(b'\xef\xbb\xbf\r "').decode(errors="replace")) in FIELDS:
        return ","
    return separator


def table(head: bytes, line: int, file: IO[bytes], delimiter: str) -> Iterator[tuple[int, Record]]:
    """(line, record) of the rows of a CSV or TSV file that begins with `head`. `line` is where a row begins.

    Raises `DatasetError` for a malformed table.
    """
    csv.field_size_limit(limits.MAX_RECORD_BYTES)
    source = _DecodedLines(head, line, file)
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
            names = [name for name in columns if name]
            if len(set(names)) < len(names):
                raise DatasetError(start, None, "the header names a column twice")
        elif len(row) == len(columns):
            yield start, {name: _cell(name, value, start) for name, value in zip(columns, row, strict=True) if name}
        elif row:
            raise DatasetError(start, None, f"has {len(row)} columns, the header {len(columns)}")


class _DecodedLines:
    """Iterates over the lines of a UTF-8 file. `line` is the number of the next one. Too long a line is refused."""

    def __init__(self, head: bytes, line: int, file: IO[bytes]) -> None:
        self.line, self.file = line, file
        self._ahead = io.BytesIO(head)

    def __iter__(self) -> "_DecodedLines":
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
    """The value of a cell. JSON is parsed in a `STRUCTURED` column, and elsewhere only if it is messages.

    Other JSON stays text, because an answer may be JSON.
    """
    structured = plain_name(name) in STRUCTURED
    if not value.startswith(("[", "{") if structured else ("[{", '{"')):
        return value
    try:
        parsed = json_text.parse(line, value.encode(errors="surrogatepass"))
    except DatasetError as error:
        if "values" in error.reason:
            raise DatasetError(line, name, f"holds more than {limits.MAX_VALUES} values") from error
        return value
    return parsed if structured or _is_messages(parsed) else value


def _is_messages(value: object) -> bool:
    """Whether a JSON value is a message or a list of messages, and not an answer that happens to be JSON."""
    turns = value if isinstance(value, list) else [value]
    return bool(turns) and all(
        isinstance(turn, dict)
        and (
            ("role" in turn and not turn.keys().isdisjoint(("content", "tool_calls")))
            or {"from", "value"} <= turn.keys()
        )
        for turn in turns
    )


def parquet(file: IO[bytes]) -> Iterator[tuple[int, Record]]:
    """(number, record) of the rows of a Parquet file. Numbers count from 1.

    Raises `DatasetError` for a damaged file, and for rows that unpack to too much.
    """
    import pyarrow
    from pyarrow import parquet

    number = unpacked = 0
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
            has_dictionary = any(pyarrow.types.is_dictionary(column.type) for column in batch.columns)
            large = has_dictionary or batch.nbytes > 2 * limits.MAX_RECORD_BYTES
            for rows in (batch.slice(k, 1) for k in range(batch.num_rows)) if large else (batch,):
                counted = large or batch.nbytes > limits.MAX_VALUES
                unpacked += 0 if counted else rows.nbytes
                for record, value_count, length in _plain_rows(rows, count=counted):
                    number += 1
                    if length > limits.MAX_RECORD_BYTES:
                        raise DatasetError(number, None, f"the record is larger than {limits.MAX_RECORD_BYTES} bytes")
                    if value_count > limits.MAX_VALUES:
                        raise DatasetError(number, None, f"the record has more than {limits.MAX_VALUES} values")
                    unpacked += length
                    refuse_bomb(unpacked, size)
                    yield number, record
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError) as error:
        raise DatasetError(number + 1, None, f"the Parquet file cannot be read: {error}") from error


def _plain_rows(batch: "pyarrow.RecordBatch", *, count: bool) -> Iterator[tuple[Record, int, int]]:
    """(record, number of values at all depths, length of its texts) of the rows of an Arrow batch.

    Without `count` the two numbers are 0.
    """
    columns = [_column_values(column) for column in batch.columns]
    for values in zip(*columns, strict=True) if columns else [()] * batch.num_rows:
        value_count, length = _measure(values) if count else (0, 0)
        yield dict(zip(batch.schema.names, values, strict=True)), value_count, length


def _column_values(column: "pyarrow.Array") -> list[object]:
    """The values of an Arrow column as JSON would have them. NaN becomes null, and binary values become text.

    Null members of structs are left out: all rows of a column have the same members, and missing ones are null.
    """
    import pyarrow

    values: list[object] = column.to_pylist(maps_as_pydicts="lossy")
    if pyarrow.types.is_nested(column.type):
        return [_cleaned(value) for value in values]
    if pyarrow.types.is_floating(column.type):
        return [None if value != value else value for value in values]
    if pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type):
        return [_decoded(value) for value in values]
    return values


def _cleaned(value: object) -> object:
    """A nested value without null members; NaN becomes null."""
    if type(value) is str:
        return value
    if type(value) is dict:
        return {name: _cleaned(item) for name, item in value.items() if item is not None}
    if type(value) is list:
        return [_cleaned(item) for item in value]
    return None if value != value else value


def _decoded(value: object) -> object:
    """UTF-8 bytes as text; other bytes, and null, as they are."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def _measure(value: object) -> tuple[int, int]:
    """(number of values at all depths, length of the texts in characters or bytes)."""
    if isinstance(value, str | bytes):
        return 1, len(value)
    if isinstance(value, dict | list | tuple):
        measures = [_measure(item) for item in (value.values() if isinstance(value, dict) else value)]
        return 1 + sum(value_count for value_count, _ in measures), sum(length for _, length in measures)
    return 1, 0
