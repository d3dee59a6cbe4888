"""Small files that expand to huge data are refused, or read in little memory, without a crash."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from pydantic import ValidationError

from app.spec.datasets import limits, unpack
from app.spec.datasets.check import survey
from app.spec.datasets.errors import DatasetError
from app.spec.datasets.mapping import Mapping

MAX_PEAK_BYTES = 350 * 1024 * 1024
"""The most that the reading process may use: Python, pyarrow and a few records of the maximum size."""


ROW = b'{"prompt": "' + b"q" * 4000 + b'", "chosen": "a", "rejected": "b"}\n'


class _Endless(io.RawIOBase):
    """A file of `size` bytes: `head`, then repeated `filler`. It is never in memory as a whole."""

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


def packed(packer_name: str, head: bytes, filler: bytes, megabytes: int) -> bytes:
    """`head` and megabytes of `filler`, compressed. They are never in memory as a whole."""
    packer, piece = PACKERS[packer_name](), filler * (1024 * 1024 // len(filler))
    return b"".join([packer.compress(head), *(packer.compress(piece) for _ in range(megabytes)), packer.flush()])


def zipped(head: bytes, filler: bytes, megabytes: int) -> bytes:
    """The same as the only file of a ZIP archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("rows.jsonl", "w") as file:
        file.write(head)
        for _ in range(megabytes):
            file.write(filler * (1024 * 1024 // len(filler)))
    return buffer.getvalue()


def rows_of_one_value() -> bytes:
    """A Parquet file that stores a megabyte of text once and uses it in 2,000 rows: 6 GB in three columns."""
    buffer = io.BytesIO()
    indices = pyarrow.array([0] * 2_000, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(indices, ["x" * 1024 * 1024])
    parquet.write_table(
        pyarrow.table({"prompt": column, "chosen": column, "rejected": column}), buffer, compression="zstd"
    )
    return buffer.getvalue()


def bombs() -> Iterator[tuple[str, IO[bytes], str]]:
    """(name, file, phrase in the refusal)."""
    ten_gigabytes = 10 * 1024**3
    large, ratio = "larger than", "times its size"
    yield "one line of 10 GB", endless(b'{"prompt": "', b"x", ten_gigabytes), large
    yield "one cell of 10 GB", endless(b'prompt,chosen,rejected\n"', b"x", ten_gigabytes), large
    yield "an array of one 10 GB element", endless(b'[{"prompt": "', b"x", ten_gigabytes), large
    yield "brackets that never close", endless(b"", b"[", ten_gigabytes), "nested too deep"
    yield "objects that never close", endless(b"", b'{"a":', ten_gigabytes), large
    for packer_name in PACKERS:
        yield f"one line of 40 MB in {packer_name}", io.BytesIO(packed(packer_name, b'{"prompt": "', b"x", 40)), large
        yield f"blanks only in {packer_name}", io.BytesIO(packed(packer_name, b"", b" ", 80)), ratio
        yield f"the same row again and again in {packer_name}", io.BytesIO(packed(packer_name, b"", ROW, 80)), ratio
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
    """A process of its own reads them, since the kernel records its peak memory."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.unit.test_bombs"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    results = json.loads(process.stdout)
    assert [name for name, refused, _ in results if not refused] == []
    assert max(peak for _, _, peak in results) < MAX_PEAK_BYTES, results


@pytest.mark.parametrize("rows", [1, 1000, 60_000])
def test_a_repetitive_file_that_is_no_bomb_is_read(rows: int) -> None:
    """A long system prompt in every row expands 500 kB to 90 MB."""
    row = {"prompt": "q", "system": "s" * 1500, "chosen": "a", "rejected": "b"}
    lines = b"\n".join([json.dumps(row).encode()] * rows)
    packed = gzip.compress(lines)
    assert survey(io.BytesIO(packed)).rows == rows
    assert rows < 60_000 or len(lines) > 150 * len(packed)


def _peak() -> int:
    """Peak memory in bytes since the program began. The peak of `getrusage` includes the parent process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Read every bomb. Print whether it was refused for the right reason, and the peak memory so far."""
    unpack.UNPACKED_BYTES = 64 * 1024**2  # the usual limit of gigabytes would only take longer
    results = []
    for name, file, phrase in bombs():
        report = survey(file).as_json()
        refused = phrase in str(report["error"]) if phrase else not report["valid"] or report["kept"] == 0
        json.dumps(report, allow_nan=False).encode()
        results.append((name, refused, _peak()))
        if not refused:
            print(name, json.dumps(report)[:300], file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()


TEXT = "x" * limits.MAX_RECORD_BYTES


@pytest.mark.parametrize(
    "mapping",
    [
        {"prompt": "{x}" * 64, "chosen": "y", "rejected": "y"},
        {"prompt": "{x}", "chosen": "{x}", "rejected": "{x}"},
        {"prompt": "y", "responses": ["x"] * 64},
        {"prompt": "y", "responses": ["x", "X", "x ", " X"]},
        {"prompt": "nested", "chosen": "nested", "rejected": "{nested}"},
    ],
    ids=["one template", "several templates", "a list of sources", "names that differ in case", "an object"],
)
def test_a_mapping_makes_no_larger_record_than_a_file_may_have(mapping: dict[str, Any]) -> None:
    """The sizes are added up before anything is copied."""
    record: dict[str, object] = {"x": TEXT, "y": "small", "nested": {"text": TEXT}}
    parsed = Mapping.model_validate(mapping)
    tracemalloc.start()
    try:
        with pytest.raises(DatasetError, match=r"Line 7: field '.*': fills the fields of the mapping with more than"):
            parsed.apply(record, 7)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * limits.MAX_RECORD_BYTES


def test_a_mapping_may_use_a_value_several_times_if_it_is_small() -> None:
    mapping = Mapping.model_validate({"prompt": "{x}: {x} {{y}}", "chosen": "x", "rejected": "x"})
    assert mapping.apply({"x": "word"}, 1) == {"prompt": "word: word {y}", "chosen": "word", "rejected": "word"}


def test_a_template_names_a_bounded_number_of_columns() -> None:
    with pytest.raises(ValidationError, match="names 65 columns; a template may name at most 64"):
        Mapping.model_validate({"prompt": "{x}" * 65, "chosen": "y", "rejected": "z"})
