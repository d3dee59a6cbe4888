"""Small files that stand for much: they are refused, or read, in little memory; and never by a crash."""

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow
import pytest
from pyarrow import parquet

from app.datasets.check import survey
from app.datasets.reader import MAX_RECORD_BYTES

PEAK = 350 * 1024 * 1024
"""Of a process that reads the file: Python, pyarrow, a few records at their limit."""


ROW = b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n'


class _Endless(io.RawIOBase):
    """`head`, then `size` bytes of `filler`; nothing of it is in memory."""

    def __init__(self, head: bytes, filler: bytes, size: int) -> None:
        self.head, self.filler, self.size, self.place = head, filler * 65536, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + (0 if whence == io.SEEK_SET else self.size)
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        piece = (self.head[self.place :] or self.filler)[: min(len(buffer), max(0, self.size - self.place))]
        buffer[: len(piece)] = piece
        self.place += len(piece)
        return len(piece)


def endless(head: bytes, filler: bytes, size: int) -> IO[bytes]:
    return io.BufferedReader(_Endless(head, filler, size))  # type: ignore[type-var]


def packed(head: bytes, filler: bytes, megabytes: int) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=6) as file:
        file.write(head)
        for _ in range(megabytes):
            file.write(filler * (1024 * 1024 // len(filler)))
    return buffer.getvalue()


def rows_of_one_value() -> bytes:
    """A Parquet file in which a text of a megabyte is written once and stands in 2,000 rows: 6 GB with three columns."""
    buffer = io.BytesIO()
    indices = pyarrow.array([0] * 2_000, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(indices, ["x" * 1024 * 1024])
    parquet.write_table(
        pyarrow.table({"prompt": column, "chosen": column, "rejected": column}), buffer, compression="zstd"
    )
    return buffer.getvalue()


def bombs() -> Iterator[tuple[str, IO[bytes], str]]:
    """(name, file, what its refusal says)."""
    ten_gigabytes = 10 * 1024**3
    large, ratio = "larger than", "times its size"
    yield "one line of 10 GB", endless(b'{"prompt": "', b"x", ten_gigabytes), large
    yield "one cell of 10 GB", endless(b'prompt,chosen,rejected\n"', b"x", ten_gigabytes), large
    yield "an array of one 10 GB element", endless(b'[{"prompt": "', b"x", ten_gigabytes), large
    yield "brackets that never close", endless(b"", b"[", ten_gigabytes), large
    yield "objects that never close", endless(b"", b'{"a":', ten_gigabytes), large
    yield "one line of 64 MB, gzipped", io.BytesIO(packed(b'{"prompt": "', b"x", 64)), large
    yield "blanks only, gzipped", io.BytesIO(packed(b"", b" ", 80)), ratio
    yield "the same row again and again, gzipped", io.BytesIO(packed(b"", ROW, 80)), ratio
    yield "one value in many rows of Parquet", io.BytesIO(rows_of_one_value()), ratio
    yield "depth", io.BytesIO(b'{"prompt": ' + b"[" * 5_000_000), ""
    yield "depth that closes", io.BytesIO(b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), ""
    yield "a million keys", io.BytesIO(b'{"k":1' + b',"k":1' * 1_000_000 + b"}"), "values"
    yield "a million keys with blanks", io.BytesIO(b'{"k" :1' + b',"k" :1' * 1_000_000 + b"}"), "values"
    yield "a million keys that end in a backslash", io.BytesIO(rb'{"\\":1' + rb',"\\":1' * 1_000_000 + b"}"), "values"
    yield "millions of empty lists", io.BytesIO(b'{"prompt": [[]' + b",[]" * 5_000_000 + b"]}"), "values"
    yield (
        "a million keys in a cell",
        io.BytesIO(b'messages,note\n"[{""k"":1' + b',""k"":1' * 1_000_000 + b'}]",x'),
        "values",
    )
    yield "numbers that are none", io.BytesIO(b'{"prompt": NaN, "chosen": Infinity}'), ""
    yield "a number of a million digits", io.BytesIO(b'{"prompt": ' + b"1" * 1_000_000 + b"}"), ""
    yield "half a surrogate pair", io.BytesIO(rb'{"prompt": "\ud800", "chosen": "a", "rejected": "b"}'), ""
    yield "many columns", io.BytesIO(b",".join(b"c%d" % number for number in range(1_000_000)) + b"\n1,2\n"), "columns"


def test_bombs_are_refused_in_little_memory() -> None:
    """In a process of its own, whose greatest size the kernel remembers."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.test_bombs"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert [name for name, refused, _ in told if not refused] == []
    assert max(peak for _, _, peak in told) < PEAK, told


@pytest.mark.parametrize("rows", [1, 1000])
def test_what_is_only_repetitive_is_read(rows: int) -> None:
    row = {"prompt": "q" * 1000, "chosen": "a", "rejected": "b"}
    lines = b"\n".join(json.dumps(row).encode() for _ in range(rows))
    assert survey(io.BytesIO(gzip.compress(lines))).rows == rows
    assert len(lines) < MAX_RECORD_BYTES


def _peak() -> int:
    """Bytes; the kernel's own count since the program began (that of `getrusage` goes back to the process before)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Read every bomb; tell whether it was refused for the right reason, and the process's greatest size by then."""
    told = []
    for name, file, reason in bombs():
        report = survey(file).as_json()
        refused = reason in str(report["error"]) if reason else not report["valid"] or report["kept"] == 0
        json.dumps(report, allow_nan=False).encode()
        told.append((name, refused, _peak()))
        if not refused:
            print(name, json.dumps(report)[:300], file=sys.stderr)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
