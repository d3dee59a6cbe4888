"""Small files that stand for much: they are refused, or read, in little memory; and never by a crash."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from app.spec.datasets import unpack
from app.spec.datasets.check import survey

PEAK = 350 * 1024 * 1024
"""Of a process that reads the file: Python, pyarrow, a few records at their limit."""


ROW = b'{"prompt": "' + b"q" * 4000 + b'", "chosen": "a", "rejected": "b"}\n'


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


PACKERS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.compressobj(wbits=31),
    "bzip2": bz2.BZ2Compressor,
    "xz": lambda: lzma.LZMACompressor(preset=0),
    "Zstandard": zstandard.ZstdCompressor().compressobj,
}


def packed(kind: str, head: bytes, filler: bytes, megabytes: int) -> bytes:
    """`head`, then megabytes of `filler`, compressed; they are never in memory together."""
    packer, piece = PACKERS[kind](), filler * (1024 * 1024 // len(filler))
    return b"".join([packer.compress(head), *(packer.compress(piece) for _ in range(megabytes)), packer.flush()])


def zipped(head: bytes, filler: bytes, megabytes: int) -> bytes:
    """The same as the one file of a ZIP."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("rows.jsonl", "w") as file:
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
    yield "brackets that never close", endless(b"", b"[", ten_gigabytes), "nested too deep"
    yield "objects that never close", endless(b"", b'{"a":', ten_gigabytes), large
    for kind in PACKERS:
        yield f"one line of 40 MB in {kind}", io.BytesIO(packed(kind, b'{"prompt": "', b"x", 40)), large
        yield f"blanks only in {kind}", io.BytesIO(packed(kind, b"", b" ", 80)), ratio
        yield f"the same row again and again in {kind}", io.BytesIO(packed(kind, b"", ROW, 80)), ratio
    yield "one line of 40 MB in a ZIP", io.BytesIO(zipped(b'{"prompt": "', b"x", 40)), large
    yield "the same row again and again in a ZIP", io.BytesIO(zipped(b"", ROW, 80)), ratio
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
    yield "many columns", io.BytesIO(b",".join(b"c%d" % number for number in range(300_000)) + b"\n1,2\n"), "columns"


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


@pytest.mark.parametrize("rows", [1, 1000, 60_000])
def test_what_is_only_repetitive_is_read(rows: int) -> None:
    """A long system prompt that all rows have: 90 MB from 500 kB, and no bomb."""
    row = {"prompt": "q", "system": "s" * 1500, "chosen": "a", "rejected": "b"}
    lines = b"\n".join([json.dumps(row).encode()] * rows)
    packed = gzip.compress(lines)
    assert survey(io.BytesIO(packed)).rows == rows
    assert rows < 60_000 or len(lines) > 150 * len(packed)


def _peak() -> int:
    """Bytes; the kernel's own count since the program began (that of `getrusage` goes back to the process before)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Read every bomb; tell whether it was refused for the right reason, and the process's greatest size by then."""
    unpack.UNPACKED_BYTES = 64 * 1024**2  # gigabytes of rows would only take longer
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
