"""Messages of a conversation, and rows of a dataset as the bytes of a file."""

import csv
import io
import json
from typing import Any

import pyarrow
from pyarrow import parquet

from app.spec.datasets.example import Message
from app.spec.json_types import JsonObject


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Message:
    """An answer. `more` are other fields of the message: reasoning, tool calls, and names that only some readers know."""
    return {"role": "assistant", "content": text, **more}  # type: ignore[typeddict-item]


def as_lines(rows: list[JsonObject]) -> bytes:
    """JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[JsonObject]) -> bytes:
    """CSV, with lists and objects as JSON in a cell, and null as an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    for row in rows:
        cells = {
            name: json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
            for name, value in row.items()
        }
        writer.writerow(cells)
    return text.getvalue().encode()


def as_parquet(rows: list[JsonObject]) -> bytes:
    """A Parquet file of one table."""
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()
