"""`python -m bench.datasets [--keep FILE]`: speed of the file check by form, in MB/s of plain text on one core.

Each figure is the fastest of `RUNS` checks of one file of about `SIZE` bytes. The rows are UltraFeedback's from
`DPO_SHARED`, or text drawn from a seed without that folder. The code is this project's own.
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

import pyarrow
from pyarrow import parquet
from rich.console import Console
from rich.table import Table

from app.spec.datasets.check import survey
from app.spec.json_types import JsonObject
from bench.machine import describe_machine

SIZE, RUNS = 40_000_000, 3
SHARED = Path(os.environ.get("DPO_SHARED", "../shared")) / "data/preference/ultrafeedback/clean.jsonl"
Rows = list[JsonObject]


def prose() -> list[str]:
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


def pairs(texts: list[str]) -> Rows:
    """Pairs of these texts, `SIZE` characters in all."""
    rows, size, number = Rows(), 0, 0
    while size < SIZE:
        row = {
            "prompt": f"{number} {texts[number % len(texts)]}",
            "chosen": texts[(number + 1) % len(texts)],
            "rejected": texts[(number + 2) % len(texts)],
        }
        rows.append(row)
        size += sum(map(len, row.values()))
        number += 1
    return rows


def chats(texts: list[str]) -> Rows:
    return [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}] * 3}
        for row in pairs(texts)[::4]
    ]


def labelled(texts: list[str]) -> Rows:
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": number % 2 == 0}
        for number, row in enumerate(pairs(texts))
    ]


def json_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def json_array(rows: Rows) -> bytes:
    return json.dumps(rows, indent=1).encode()


def comma_separated(rows: Rows) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet_bytes(rows: Rows) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def answers(count: int) -> bytes:
    """Ranked rows of `count` answers each, a megabyte in all, as JSON Lines."""
    responses = [f"answer number {number}, which is like no other" for number in range(count)]
    row = {"prompt": "q", "responses": responses, "scores": list(range(count))}
    return json_lines([row] * max(1, 1_000_000 // (45 * count)))


def cases() -> Iterator[tuple[str, Callable[[], tuple[bytes, int]]]]:
    """(form, a function that makes its file). The function returns the file and its size as plain text, in bytes."""

    def file(write: Callable[[Rows], bytes], make_rows: Callable[[], Rows]) -> Callable[[], tuple[bytes, int]]:
        def make_file() -> tuple[bytes, int]:
            rows = make_rows()
            content = write(rows)
            return content, len(json_lines(rows)) if write is parquet_bytes else len(content)

        return make_file

    yield "JSON Lines, pairs", file(json_lines, lambda: pairs(prose()))
    yield "JSON Lines, chats", file(json_lines, lambda: chats(prose()))
    yield "JSON Lines, labelled", file(json_lines, lambda: labelled(prose()))
    yield "JSON Lines, code", file(json_lines, lambda: pairs(code()))
    yield "JSON array, pairs", file(json_array, lambda: pairs(prose()))
    yield "JSON array, chats", file(json_array, lambda: chats(prose()))
    yield "JSON array, code", file(json_array, lambda: pairs(code()))
    yield "CSV, pairs", file(comma_separated, lambda: pairs(prose()))
    yield "Parquet, pairs", file(parquet_bytes, lambda: pairs(prose()))
    yield "Parquet, chats", file(parquet_bytes, lambda: chats(prose()))
    for count in (4, 16, 64):
        yield f"ranked, {count} answers a row", lambda count=count: (answers(count), 1_000_000)  # type: ignore[misc]


def measure(content: bytes, size: int) -> float:
    """MB/s of plain text. `size` is the number of its bytes."""
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
    speeds: dict[str, float] = {}
    table = Table("form", "MB/s")
    for name, make_file in cases():
        speeds[name] = round(measure(*make_file()), 1)
        table.add_row(name, f"{speeds[name]:.0f}")
    Console().print(table)
    if keep is not None:
        keep.write_text(json.dumps({"machine": describe_machine(), "megabytes_per_second": speeds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
