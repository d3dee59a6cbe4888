"""`python -m bench.datasets [--keep FILE]`: how fast a file is checked, by form, in MB/s of plain text on one core.

Each figure is the fastest of `RUNS` checks of one file of about `SIZE` bytes. The rows are UltraFeedback's from
`DPO_SHARED` where it is there, else text drawn from a seed; code is this project's own.
"""

import argparse
import csv
import io
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet
from rich.console import Console
from rich.table import Table

from app.spec.datasets.check import survey
from bench.machine import describe_machine

SIZE, RUNS = 40_000_000, 3
SHARED = Path(os.environ.get("DPO_SHARED", "../shared")) / "data/preference/ultrafeedback/clean.jsonl"
Rows = list[dict[str, Any]]


def texts() -> list[str]:
    """Texts of a few kilobytes, as people write them."""
    if SHARED.exists():
        rows = [json.loads(line) for line in SHARED.read_text().splitlines()]
        return [row[name] for row in rows for name in ("prompt", "chosen", "rejected") if row[name]]
    source = random.Random(0)
    return [" ".join(source.choice(["the", "cat", "sat", "on", "a", "mat"]) for _ in range(300)) for _ in range(3000)]


def code() -> list[str]:
    """Pieces of source code, which JSON writes with many escapes."""
    whole = "\n".join(path.read_text() for path in sorted(Path().glob("*/**/*.py")) if ".venv" not in path.parts)
    return [whole[start : start + 1500] for start in range(0, len(whole) - 1500, 1500)]


def pairs(of: list[str]) -> Rows:
    rows, size, number = Rows(), 0, 0
    while size < SIZE:
        row = {
            "prompt": f"{number} {of[number % len(of)]}",
            "chosen": of[(number + 1) % len(of)],
            "rejected": of[(number + 2) % len(of)],
        }
        rows.append(row)
        size += sum(map(len, row.values()))
        number += 1
    return rows


def chats(of: list[str]) -> Rows:
    return [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}] * 3}
        for row in pairs(of)[::4]
    ]


def labelled(of: list[str]) -> Rows:
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": number % 2 == 0}
        for number, row in enumerate(pairs(of))
    ]


def lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def array(rows: Rows) -> bytes:
    return json.dumps(rows, indent=1).encode()


def table(rows: Rows) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def columns(rows: Rows) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def answers(count: int) -> bytes:
    """Rows of `count` answers each, a megabyte in all."""
    each = [f"answer number {number}, which is like no other" for number in range(count)]
    row = {"prompt": "q", "responses": each, "scores": list(range(count))}
    return lines([row] * max(1, 1_000_000 // (45 * count)))


def cases() -> Iterator[tuple[str, Callable[[], tuple[bytes, int]]]]:
    """(form, what makes the file and says how many bytes of text it stands for)."""

    def file(make: Callable[[Rows], bytes], rows: Callable[[], Rows]) -> Callable[[], tuple[bytes, int]]:
        def made() -> tuple[bytes, int]:
            content = rows()
            written = make(content)
            return written, len(lines(content)) if make is columns else len(written)

        return made

    yield "JSON Lines, pairs", file(lines, lambda: pairs(texts()))
    yield "JSON Lines, chats", file(lines, lambda: chats(texts()))
    yield "JSON Lines, labelled", file(lines, lambda: labelled(texts()))
    yield "JSON Lines, code", file(lines, lambda: pairs(code()))
    yield "JSON array, pairs", file(array, lambda: pairs(texts()))
    yield "JSON array, chats", file(array, lambda: chats(texts()))
    yield "JSON array, code", file(array, lambda: pairs(code()))
    yield "CSV, pairs", file(table, lambda: pairs(texts()))
    yield "Parquet, pairs", file(columns, lambda: pairs(texts()))
    yield "Parquet, chats", file(columns, lambda: chats(texts()))
    for count in (4, 16, 64):
        yield f"ranked, {count} answers a row", lambda count=count: (answers(count), 1_000_000)  # type: ignore[misc]


def measure(content: bytes, size: int) -> float:
    """MB/s of text."""
    fastest = float("inf")
    for _ in range(RUNS):
        began = time.perf_counter()
        report = survey(io.BytesIO(content))
        fastest = min(fastest, time.perf_counter() - began)
        if report.error is not None or not report.kept:
            raise SystemExit(f"The bench's own file is refused: {report.error or report.dropped}")
    return size / 1e6 / fastest


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--keep", type=Path, help="write the figures to this file")
    keep: Path | None = arguments.parse_args().keep
    found: dict[str, float] = {}
    shown = Table("form", "MB/s")
    for name, make in cases():
        found[name] = round(measure(*make()), 1)
        shown.add_row(name, f"{found[name]:.0f}")
    Console().print(shown)
    if keep is not None:
        keep.write_text(json.dumps({"machine": describe_machine(), "megabytes_per_second": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
