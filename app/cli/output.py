"""Input and output of commands: request bodies from files, and results as text or, with `--json`, as JSON."""

import sys
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.spec.json_types import JsonObject

console = Console(width=None if sys.stdout.isatty() else 240)
"""Output to a pipe is not folded to the width of a terminal."""
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Limit = Annotated[int, typer.Option(min=1, help="At most this many.")]


def _empty(folder: Path) -> Path:
    """Check that a folder is empty or new."""
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise typer.BadParameter(f"{folder} is not {'a folder' if folder.is_file() else 'empty'}")
    return folder


Output = Annotated[Path, typer.Option(help="Folder to unpack into; it must be empty or new.", callback=_empty)]


CONTROLS = {number: f"\\x{number:02x}" for number in (*range(0x20), *range(0x7F, 0xA0)) if chr(number) not in "\n\t"}
"""Control characters, and how they are shown. A terminal would obey them, and users choose the texts that we print."""
JSON_CONTROLS = {number: f"\\u{number:04x}" for number in range(0x7F, 0xA0)}
"""Those that JSON does not escape."""


def plain(text: str) -> str:
    """`text` with its control characters shown instead of sent to the terminal."""
    return text.translate(CONTROLS)


def as_json_text(value: object, *, indent: bool = True) -> str:
    """`value` as JSON without raw control characters."""
    option = orjson.OPT_INDENT_2 if indent else 0
    return orjson.dumps(value, option=option).decode().translate(JSON_CONTROLS)


def emit(value: object, as_json: bool, text: str) -> None:
    """Print `value` as JSON, or `text`."""
    print(as_json_text(value) if as_json else plain(text))


def emit_table(rows: list[JsonObject], columns: list[str], as_json: bool) -> None:
    """Print `rows` as JSON, or their `columns` as a table."""
    if as_json:
        print(as_json_text(rows))
        return
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if row.get(column) is None else plain(str(row[column]))) for column in columns))
    console.print(table)


def read_body(spec: Path | None) -> JsonObject:
    """The body in the file of `--spec`; `-` means standard input. Without a file it is empty."""
    if spec is None:
        return {}
    try:
        body = orjson.loads(sys.stdin.buffer.read() if str(spec) == "-" else spec.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise typer.BadParameter(str(error), param_hint="--spec") from error
    if not isinstance(body, dict):
        raise typer.BadParameter("must hold a JSON object", param_hint="--spec")
    return body


def read_gates(texts: list[str] | None) -> list[JsonObject]:
    """The gates of `--gate`: METRIC>=NUMBER or METRIC<=NUMBER."""
    return [_gate(text) for text in texts or []]


def _gate(text: str) -> JsonObject:
    metric, sign, number = text.partition(">=") if ">=" in text else text.partition("<=")
    try:
        return {"metric": metric.strip(), "min" if sign == ">=" else "max": float(number)}
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not METRIC>=NUMBER or METRIC<=NUMBER", param_hint="--gate") from None
